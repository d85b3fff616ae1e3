"""Every setting: its type, range and default and, in the text below it, its documentation; some sections are in written.py.

The text below a field is its help, its line in docs/configuration.md and its description in the JSON schema. Values are frozen after
loading. The pipeline resolves "auto" and shows the result before training. A setting stands here only if the program reads it:
tests/test_documents.py fails otherwise.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from llamahome.config.columns import check_columns
from llamahome.config.learning import DistillConfig, GrpoConfig
from llamahome.config.objectives import ObjectiveName
from llamahome.config.optimizers import OptimizerName
from llamahome.config.preference import PreferenceConfig
from llamahome.config.quantities import Amount, LayerNumbers, Nodes, PositiveInt, SecondsText
from llamahome.config.section import Auto, Section, Share
from llamahome.config.written import CheckpointConfig, EvaluationConfig, MonitoringConfig, OutputConfig
from llamahome.rundir import STARTER
from llamahome.units import Interval, parse_interval, parse_nodes


class ModelConfig(Section):
    """The base model."""

    name: str = STARTER
    """A folder, a name under data/models/base/, `smollm2-135m-instruct` (the starter), or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Storage of frozen weights. auto: bfloat16 where this machine multiplies it faster than float32 (probed), else float32; float16 with
    training.mixed_precision fp16, and only with it."""
    backend: Literal["auto", "cuda", "cpu", "reference"] = "auto"
    """Code that computes: `cuda` for NVIDIA GPUs, `cpu` for processors, or `reference`, plain torch for any device, slow and for checking.
    auto: chosen by the device of this process and printed at the start."""
    chat_template: str | None = None
    """A .jinja file that replaces the model's own chat template."""
    adapter: str | None = None
    """An adapter to train further: a run, a checkpoint, or a PEFT LoRA folder. Its base, ranks and layers take the place of model.name and
    lora.*; the optimizer starts anew."""
    quantization: Literal["nf4", "int8"] | None = None
    """Keep the frozen linear layers of the decoder in 4 bits (nf4 with double quantisation, 0.52 to 0.62 bytes a parameter) or 8 (int8),
    for LoRA beside a base that does not fit in 16 bits. The base is quantised once, which takes minutes in nf4, and kept under
    data/models/quantized/."""
    resize_embeddings: bool = False
    """If the tokenizer has more tokens than the embedding has rows: add rows, train them (with adapters only these) and save them."""
    new_tokens: list[str] | str = []
    """Tokens to add to the tokenizer, as a list, or a text file with one token a line. Each begins as the mean of the tokens that its text
    had; with adapters only the rows of these tokens are trained. They are no special tokens: docs/Methods.md."""
    eos_token: str | None = None
    """The token of the vocabulary that ends a text, if the tokenizer names none or another one; it is learned and saved with the model."""
    system_role: Literal["auto", "turn", "merge"] = "auto"
    """System texts become a turn of their own, or are merged into the first question, in rows and in the template that is saved.
    auto: merged if the template, like Gemma's or Mistral's, has no system turn."""


class DataConfig(Section):
    """What is read and what of it is learned."""

    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "labelled", "prompts"] = "auto"
    """Format of the rows. auto: detected from the first rows, and the reason is shown; preference (a better and a worse answer to one
    prompt) where training.objective learns from pairs, labelled (an answer, and whether it is good) where it is kto, and prompts (with or
    without answers) where it is grpo."""
    columns: Annotated[dict[str, str], AfterValidator(check_columns)] = {}
    """Other names of keys in the rows, as {prompt: question, completion: answer}: our key, then the column. Or a template over columns, as
    {prompt: "{question}\\n\\n{passage}", completion: answer}; a line of it whose columns are all empty in a row is left out."""
    train_on: Literal["assistant", "all", "last"] = "assistant"
    """Which tokens are learned: every assistant turn with its end-of-turn token, all tokens, or only the last assistant turn."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest example in tokens; `on_overlong` says what happens to longer ones."""
    on_overlong: Literal["truncate", "drop", "split", "error"] = "truncate"
    """Rows longer than max_length: cut off the end, leave the row out, split it (text only), or stop. They are counted and shown."""
    max_lost_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Stop when more than this share of the targets would be lost to rows longer than max_length; 1 never stops."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Rows that cannot be used: stop and list them all, or leave them out and count them."""
    max_bad_share: Share = 0.001
    """With on_bad_row skip: stop when more than this share of the rows is bad."""
    eval_split: Auto | Annotated[float, Field(ge=0)] = "auto"
    """Rows held out for evaluation, chosen by content: below 1 a share, from 1 on a count, 0 none.
    auto: 2 %, but at least 32 rows if there are 320 or more, and at most 1,000."""
    split: str | None = None
    """Which split of a folder or hub data set is read; `all` reads every split. null: train, and test or validation to evaluate."""
    subset: str | None = None
    """Which subset (configuration) of a folder or hub data set is read; `all` reads every subset."""
    eval_path: str | None = None
    """A file of rows to evaluate on; no rows are held out then. evaluation.rows says how many of them are evaluated.
    null: the validation split if there is one and eval_split is auto."""
    mixture: Annotated[dict[str, Amount], Field(examples=['{a.jsonl: 2, "b/*.jsonl": 0.5, c.jsonl: "1000 rows"}'])] = {}
    """How often rows are seen in an epoch, by file, folder or glob: a number of times, or a total like "1000 rows".
    Files that are not named are seen once. If only a part of a file is seen, it is another part in every epoch."""
    streaming: Auto | bool = "auto"
    """Tokenize rows while the model trains (true), or all of them before, into data/training/processed/ (false); the steps are the same.
    auto: before, if that takes about a minute or has been done already."""


class TrainingConfig(Section):
    """The optimization."""

    method: Literal["lora", "full"] = "lora"
    """Train a low-rank adapter on a frozen base, or every weight."""
    objective: ObjectiveName = "sft"
    """What is minimised. sft: the loss of the answers. dpo, ipo, orpo and simpo: a loss of pairs of a better and a worse answer, which
    data.format preference reads (see preference). kto: a loss of answers that are labelled good or bad (data.format labelled). distill:
    the divergence from a teacher, mixed with the loss of the answers (see distill). grpo: answers of the model itself are rewarded, and
    the better ones become likelier (see grpo). docs/Methods.md says which one when."""
    batch_size: Auto | PositiveInt = "auto"
    """Rows per step (one optimizer update), over all processes and micro-batches; a row is one example unless it is split or left out.
    auto: 4 to 32, growing with the number of rows, docs/decisions/0018-passes.md."""
    micro_batch_tokens: Auto | PositiveInt = "auto"
    """Tokens per forward and backward pass. It changes memory and speed, never the result. auto: from the device and max_length."""
    learning_rate: Auto | Annotated[float, Field(gt=0)] = "auto"
    """Peak learning rate. auto: a rule of method and model size, docs/decisions/0004-learning-rate.md, and a tenth of that
    for pairs of answers."""
    epochs: Auto | Annotated[float, Field(gt=0)] = "auto"
    """Passes over the training rows; 0.5 is half a pass.
    auto: 1 for pairs of answers. Else 1 to 24, fewer the more rows there are, the longer their answers are and the less these share,
    docs/decisions/0018-passes.md."""
    max_steps: PositiveInt | None = None
    """End the run at this step, whatever `epochs` says; the schedule ends there too."""
    max_time: SecondsText | None = None
    """End the run after the step in which it has trained for so long, with a checkpoint, an evaluation and the final model. Evaluations and
    saves between the steps count, and so does the time before a resume; loading does not. The schedule follows the steps and no clock,
    so the learning rate may still be high: `plan` and the end of the run say how high, and with which max_steps it falls to zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; cosine and linear fall to zero at the last step."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Steps of linear warm-up: below 1 a share of all steps, from 1 on a count."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay on matrices; never on biases, norms and other vectors."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this global L2 norm; null never scales."""
    optimizer: OptimizerName = "adamw"
    """The update rule. adamw: AdamW (betas 0.9 and 0.999, eps 1e-8), fused. adamw_8bit: its moments in a byte each, with a quarter of the
    memory. adafactor: a row and a column instead of the second moment, and no first one. muon: Muon for the matrices of full fine-tuning,
    AdamW for the other weights. docs/Methods.md says which one when, and that all but adamw need whole weights."""
    gradient_checkpointing: Auto | bool = "auto"
    """Keep only each layer's input and compute the rest again: about a third slower, several times less memory.
    auto: only if the activations of a micro-batch do not fit into the free memory."""
    activation_offloading: Auto | bool = "auto"
    """With gradient checkpointing, move each layer's input out of the device's memory until the backward pass needs it: to pinned memory
    of the machine, on a processor to a file in TMPDIR (/var/tmp). The result is the same bit for bit.
    auto: only if the longest row does not fit without. true also turns gradient checkpointing on."""
    mixed_precision: bool | Literal["auto", "bf16", "fp16", "no"] = "auto"
    """Type of matrix products; sums, trained weights and the optimizer stay float32. auto and true: bfloat16 if the device is measured
    to be faster with it, else float32. bf16: bfloat16, refused if the device only emulates it. no and false: float32.
    fp16: float16 with a loss scale that adapts itself, for GPUs without bfloat16; on a processor with model.backend reference only."""
    compile: Auto | bool = "auto"
    """Compile parts of the model for this device. On a processor: C++ passes, compiled in 9 seconds once per machine and kept in the
    user's cache folder. auto: if that has been done already, or if the run is long enough to win the time back, with the starter
    3,000 to 7,000 tokens per process. On a GPU: torch.compile, in the first step with a pass of each size.
    true is refused if there is nothing to compile."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all randomness: order of rows, initial adapter, dropout."""
    max_bad_steps: PositiveInt = 3
    """Consecutive steps whose updates are refused before the run goes back to the last checkpoint before them, without their rows.
    An update is refused if its loss or gradient is not finite, or as `refuse_spikes` says."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 2
    """How often a run goes back to a checkpoint before it ends as diverged."""
    refuse_spikes: bool = True
    """Also refuse an update whose loss is 5 times, or whose gradient norm is 10 times, the median of the 32 steps before, if that is far
    outside their spread and twice the largest value before. docs/decisions/0026-spikes-and-rollbacks.md has the rate of false alarms."""
    restart: Literal["off", "auto"] = "off"
    """auto: a single process that crashes or is killed starts again from its newest checkpoint, at most distributed.max_restarts times;
    a second process watches it. Several processes always start again. Errors that would come again, and stops by a signal, end the run."""
    hang_timeout: Auto | SecondsText | None = "auto"
    """How long a part of a step may last, and the start without any progress, before the run ends and shows where each process stands.
    Evaluations, saves and the first steps may last twelve times as long. auto: 20 times the median step, at least 5 min. null: for ever."""


class ScheduleConfig(Section):
    """The learning rate of a run that is resumed with another last step."""

    on_extend: Literal["keep", "replan"] = "keep"
    """The learning rate when a resumed run becomes longer or shorter. keep: it continues from the value of the last step and falls to zero
    at the new end. replan: it takes the value of a run planned to the new end from the beginning, which may be a jump."""


class LoraConfig(Section):
    """Low-rank adapters; read if training.method is lora."""

    rank: PositiveInt = 16
    """Rank of the update of each matrix."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale of the update: alpha / rank, or alpha / sqrt(rank) with use_rslora."""
    dropout: Share = 0.0
    """Share of the adapter's inputs that is dropped in training."""
    target_modules: str | list[str] = "all-linear"
    """Which weights get an adapter: all-linear (all linear layers except the output head and routers), ends of names like [q_proj, v_proj],
    or one regular expression over whole paths. Experts that are fused in one parameter, and routers, get one only if they are named:
    [all-linear, experts.gate_up_proj, experts.down_proj]."""
    layers: list[LayerNumbers] = []
    """Which decoder layers get adapters, by number from 0, as [20-29] or [0, 5, 20-29]; [] for all."""
    rank_pattern: dict[str, PositiveInt] = {}
    """Other ranks by layer, as {q_proj: 32, "layers.0.mlp.down_proj": 4}: PEFT's patterns, regular expressions for the end of a path."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Other values of alpha by layer, as rank_pattern."""
    modules_to_save: list[str] = []
    """Modules that are trained whole beside the adapters, by the ends of their names, as [lm_head, embed_tokens], and saved with them."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "loftq", "eva"] = "default"
    """Initial values. default: A uniform as in a linear layer, B zero. gaussian: A normal, B zero. orthogonal: neither is zero, but their
    product is; the rank must be even. pissa: the greatest singular parts of each weight, pissa_niter_4 about the same, sooner; olora: its
    QR decomposition; what is saved has twice the rank. loftq: the greatest parts of the error that model.quantization makes.
    eva: the principal directions of what each layer gets from the first 64 rows, which also share out the ranks. docs/Methods.md says which
    one when."""
    plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    """LoRA+ (arXiv 2402.12354): the learning rate of the B matrices is this many times that of the A matrices; 1 for equal rates."""
    use_rslora: bool = False
    """Rank-stabilized scale (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters (arXiv 2402.09353); a little slower."""
    use_vera: bool = False
    """Vector-based adapters (arXiv 2310.11454): all layers share two random matrices of this rank that are not trained, and each layer
    learns a vector for either side of them. Takes a rank around 256; lora.alpha is not used."""


class DistributedConfig(Section):
    """Processes and machines."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """How processes exchange gradients. auto: nccl with CUDA, else gloo; nccl without CUDA becomes gloo, with a note."""
    world_size: Auto | PositiveInt = "auto"
    """Processes over all machines. auto: the GPUs of this machine times the machines, or 1."""
    num_nodes: Nodes = 1
    """Machines that take part. "1:2": at least one and at most two; the run continues without a lost machine until it is back."""
    node_rank: Annotated[int, Field(ge=0)] = 0
    """Number of this machine, from 0."""
    master_addr: str = "127.0.0.1"
    """Address of machine 0."""
    master_port: Annotated[int, Field(ge=1, le=65535)] = 29500
    """Port on machine 0 where processes meet, with more than one machine; a single machine picks a free port."""
    timeout: SecondsText = "10 min"
    """How long one process waits for the others before it gives up."""
    join_timeout: SecondsText = "45 s"
    """How long machines, and processes that another launcher started, wait for each other at the beginning."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often all processes are restarted from the newest checkpoint after one of them or a machine dies."""
    strategy: Literal["auto", "replicate", "shard", "hybrid"] = "auto"
    """How weights are placed: whole on every process, sharded over all, or sharded inside a machine and replicated on every machine.
    auto: whole if they fit, because a step then sends gradients once and nothing else."""
    sync_batch_norm: bool = False
    """Batch normalization over all processes, for models that have such layers."""

    @property
    def least_nodes(self) -> int:
        """The number of machines that a run needs to continue."""
        return self.num_nodes if isinstance(self.num_nodes, int) else parse_nodes(self.num_nodes)[0]

    @property
    def most_nodes(self) -> int:
        """The number of machines that may take part; world_size is divided by it."""
        return self.num_nodes if isinstance(self.num_nodes, int) else parse_nodes(self.num_nodes)[1]


class Config(Section):
    """All settings, by section."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    preference: PreferenceConfig = PreferenceConfig()
    lora: LoraConfig = LoraConfig()
    distill: DistillConfig = DistillConfig()
    grpo: GrpoConfig = GrpoConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    distributed: DistributedConfig = DistributedConfig()
    output: OutputConfig = OutputConfig()


def interval(text: str) -> Interval:
    """The value of a validated setting like checkpoint.every."""
    return parse_interval(text)
