"""Every setting there is: its type, its range, its default and, in the text below it, its documentation.

The text below a field is its help, its line in docs/configuration.md and its description in the JSON schema: one source.
Values are frozen after loading. "auto" is resolved by pipeline.py and shown before training. A setting is listed here
only when the program obeys it: tests/test_architecture.py fails for one that nothing reads.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from llamahome.config.columns import check_columns
from llamahome.config.written import Amount, AutoInterval, IntervalText, Nodes, PositiveInt, SecondsText
from llamahome.units import Interval, parse_interval, parse_nodes

Auto = Literal["auto"]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen group of settings that knows no others than its own."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        alias_generator=lambda name: name.rstrip("_"),  # `async` is a word of Python's own
        serialize_by_alias=True,
    )


class ModelConfig(Section):
    """The base model."""

    name: str = "smollm2-135m-instruct"
    """A folder, a name under data/models/base/, `smollm2-135m-instruct` (the starter), or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Storage of frozen weights. auto: bfloat16 where this machine multiplies it faster than float32 (probed), else float32."""
    backend: Literal["auto", "cuda", "cpu", "reference"] = "auto"
    """What computes: `cuda` for NVIDIA GPUs, `cpu` for processors, `reference` in plain torch on any device, slower and for checking.
    auto: by the device that this process has, said at the start."""
    chat_template: str | None = None
    """A .jinja file that replaces the model's own chat template."""
    resize_embeddings: bool = False
    """Where the tokenizer has more tokens than the embedding has rows: add rows, train them (with adapters these alone) and save them."""
    eos_token: str | None = None
    """A token of the vocabulary that ends a text, where the tokenizer names none or another one; it is learned and saved with the model."""
    system_role: Literal["auto", "turn", "merge"] = "auto"
    """What becomes of system texts: a turn of their own, or merged into the first question, in rows and in the template that is saved.
    auto: merged where the template is of Gemma's or Mistral's kind and takes no system turn."""


class DataConfig(Section):
    """What is read and what of it is learned."""

    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """How a row is understood. auto: found from the first rows, with the reason shown."""
    columns: Annotated[dict[str, str], AfterValidator(check_columns)] = {}
    """Keys of the rows that have other names, as {prompt: question, completion: answer}: ours, then theirs; or a template over columns, as
    {prompt: "{question}\\n\\n{passage}", completion: answer}. A line of it whose columns are all empty in a row is left out."""
    train_on: Literal["assistant", "all", "last"] = "assistant"
    """Which tokens are learned: every assistant turn with its end-of-turn token, all tokens, or the last assistant turn alone."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest example in tokens; `on_overlong` says what happens to longer ones."""
    on_overlong: Literal["truncate", "drop", "split", "error"] = "truncate"
    """Rows longer than max_length: cut the end off, leave the row out, split it (text only), or stop. Counted and shown."""
    max_lost_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Stop when more than this share of the targets would be lost to rows longer than max_length; 1 never stops."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used: stop and list them all, or leave it out, counted."""
    max_bad_share: Share = 0.001
    """With on_bad_row skip: stop when more than this share of the rows is bad."""
    eval_split: Auto | Annotated[float, Field(ge=0)] = "auto"
    """Rows held out for evaluation, chosen by content: below 1 a share, from 1 on a count, 0 none.
    auto: 2 %, but at least 32 rows where there are 320 or more, and at most 1,000."""
    split: str | None = None
    """Which split of a folder or hub data set is read, `all` for every one. null: train, or test or validation of what is evaluated."""
    subset: str | None = None
    """Which subset (configuration) of a folder or hub data set is read, `all` for every one."""
    eval_path: str | None = None
    """Rows to evaluate on from a file of their own; nothing is held out then. How many of them are evaluated is evaluation.rows.
    null: the validation split where there is one and eval_split is auto."""
    mixture: Annotated[dict[str, Amount], Field(examples=['{a.jsonl: 2, "b/*.jsonl": 0.5, c.jsonl: "1000 rows"}'])] = {}
    """How often rows are seen in an epoch, by file, folder or glob: a number of times, or "1000 rows" of it in all.
    Files that are not named are seen once. What is seen of a part changes from epoch to epoch."""
    streaming: Auto | bool = "auto"
    """Tokenize rows while the model trains (true), or all of them before, into data/training/processed/ (false); the steps are the same.
    auto: before, when that takes about a minute or was done already."""


class TrainingConfig(Section):
    """The optimization."""

    method: Literal["lora", "full"] = "lora"
    """Train a low-rank adapter on a frozen base, or every weight."""
    batch_size: Auto | PositiveInt = "auto"
    """Rows per step (one optimizer update), over all processes and micro-batches; a row is one example unless it is split or left out.
    auto: 4 to 32, more the more rows there are, docs/decisions/0018-passes.md."""
    micro_batch_tokens: Auto | PositiveInt = "auto"
    """Tokens per forward and backward pass. Changes memory and speed, never the result. auto: from the device and max_length."""
    learning_rate: Auto | Annotated[float, Field(gt=0)] = "auto"
    """Peak learning rate. auto: a rule of method and model size, docs/decisions/0004-learning-rate.md."""
    epochs: Auto | Annotated[float, Field(gt=0)] = "auto"
    """Passes over the training rows; 0.5 is half a pass.
    auto: 1 to 24, fewer the more rows there are and the longer their answers, docs/decisions/0018-passes.md."""
    max_steps: PositiveInt | None = None
    """Ends the run at this step, wherever the epochs would end; the schedule ends there too."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; cosine and linear fall to zero at the last step."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Steps of linear warm-up: below 1 a share of all steps, from 1 on a count."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay on matrices; never on biases, norms and other vectors."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this global L2 norm; null never scales."""
    optimizer: Literal["adamw"] = "adamw"
    """The update rule: AdamW (betas 0.9 and 0.999, eps 1e-8), fused."""
    gradient_checkpointing: Auto | bool = "auto"
    """Keep only each layer's input and compute the rest again: about a third slower, several times less memory.
    auto: only when the activations of a micro-batch would not fit into the memory that is free."""
    mixed_precision: bool | Literal["auto", "bf16", "fp16", "no"] = "auto"
    """Type of matrix products; sums, trained weights and the optimizer stay float32. auto and true: bfloat16 where the device is measured
    to be faster at it, else float32. bf16: bfloat16, refused where the device only emulates it. no and false: float32.
    fp16: refused, because it needs loss scaling."""
    compile: Auto | bool = "auto"
    """Run parts of the model compiled for this device. On a processor: C++ passes, compiled in 9 seconds once per machine and kept in the
    user's cache folder. auto: where that is done already, or where the run is long enough to win the time back; with the starter
    that is 3,000 to 7,000 tokens per process. On a GPU: torch.compile, for each size of pass in the step that first meets it.
    true is refused where there is nothing to compile."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Source of all randomness: order of rows, initial adapter, dropout."""
    max_bad_steps: PositiveInt = 3
    """Steps in a row with a loss or gradient that is not finite (their updates are refused) before the run ends as diverged."""


class ScheduleConfig(Section):
    """The learning rate of a run that goes on with another end."""

    on_extend: Literal["keep", "replan"] = "keep"
    """What the learning rate does when a resumed run becomes longer or shorter. keep: it goes on from that of the last step and falls to
    zero at the new end. replan: it becomes that of a run planned to the new end from the beginning, which may be a jump."""


class LoraConfig(Section):
    """Low-rank adapters; read when training.method is lora."""

    rank: PositiveInt = 16
    """Rank of the update of each matrix."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale of the update: alpha / rank, or alpha / sqrt(rank) with use_rslora."""
    dropout: Share = 0.0
    """Share of the adapter's inputs that is dropped in training."""
    target_modules: str | list[str] = "all-linear"
    """Which weights get an adapter: all-linear (all linear layers but the output head and routers), ends of names like [q_proj, v_proj],
    or one regular expression over whole paths. Experts that are fused in one parameter are adapted when they are named:
    [all-linear, experts.gate_up_proj, experts.down_proj]; routers too, by theirs."""
    use_rslora: bool = False
    """Rank-stabilized scale (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters (arXiv 2402.09353); slower."""


class CheckpointConfig(Section):
    """What is saved when."""

    every: IntervalText = "10 min"
    """How often a checkpoint is saved: "500 steps", "1 epoch" or "10 min". The last step is always saved."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """Checkpoints with the lowest evaluation loss that are kept besides."""
    async_: bool = True
    """Write checkpoints beside the training, from a copy in memory; the last one is waited for. Several processes always wait, and so does
    one where a quarter of the free memory does not hold the copy."""


class EvaluationConfig(Section):
    """Looking at held-out rows before, during and after training."""

    every: AutoInterval = "auto"
    """How often in between: "100 steps", "1 epoch" or "10 min". auto: up to ten times, as often as all evaluations of the run together
    take at most a tenth of the time of training."""
    rows: Auto | Literal["all"] | PositiveInt = "auto"
    """Held-out rows, or rows of data.eval_path, that are evaluated: all of them, or so many, chosen by content and always the same.
    auto: as many as that tenth allows at the frequency of `every`, where that is auto four times in a run; at least 16."""
    sample_prompts: Annotated[int, Field(ge=0)] = 3
    """Held-out prompts that are answered at each evaluation, always the same ones."""
    early_stop_patience: PositiveInt | None = None
    """Stop after so many evaluations in a row without a lower loss; null never stops."""


class MonitoringConfig(Section):
    """What is written down while training."""

    log_every: IntervalText = "1 step"
    """How often metrics are read back and written."""
    system_every: SecondsText = "2 s"
    """How often processor, memory and disk use are sampled."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""


class DistributedConfig(Section):
    """Processes and machines."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """How processes exchange gradients. auto: nccl with CUDA, else gloo; nccl without CUDA becomes gloo, said once."""
    world_size: Auto | PositiveInt = "auto"
    """Processes over all machines. auto: the GPUs of this machine times the machines, or 1."""
    num_nodes: Nodes = 1
    """Machines that take part. "1:2": at least one and at most two; the run goes on when one is lost, and with it when it is back."""
    node_rank: Annotated[int, Field(ge=0)] = 0
    """Number of this machine, from 0."""
    master_addr: str = "127.0.0.1"
    """Address of machine 0."""
    master_port: Annotated[int, Field(ge=1, le=65535)] = 29500
    """Port on machine 0 where processes meet; used with more than one machine (one machine picks a free port)."""
    timeout: SecondsText = "10 min"
    """How long one process waits for the others before it gives up."""
    join_timeout: SecondsText = "45 s"
    """How long machines, and processes that another launcher started, wait at the beginning for all to arrive."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often all processes are started again from the newest checkpoint when one of them or a machine dies."""
    strategy: Literal["auto", "replicate", "shard", "hybrid"] = "auto"
    """How weights lie on the processes: whole on each, sharded over all, or sharded inside a machine and repeated on every machine.
    auto: whole where they fit, for then a step sends gradients once and nothing else."""
    sync_batch_norm: bool = False
    """Batch normalization over all processes, for models that have such layers."""

    @property
    def least_nodes(self) -> int:
        """Machines that a run needs to go on."""
        return self.num_nodes if isinstance(self.num_nodes, int) else parse_nodes(self.num_nodes)[0]

    @property
    def most_nodes(self) -> int:
        """Machines that may take part; world_size is shared out over so many."""
        return self.num_nodes if isinstance(self.num_nodes, int) else parse_nodes(self.num_nodes)[1]


class OutputConfig(Section):
    """Where a run is written."""

    dir: str | None = None
    """Folder of this run, exactly; null makes output/runs/<run-id>."""
    name: str | None = None
    """Last part of the run id; null picks two words."""


class Config(Section):
    """Everything that can be set, by section."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    lora: LoraConfig = LoraConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    distributed: DistributedConfig = DistributedConfig()
    output: OutputConfig = OutputConfig()


def interval(text: str) -> Interval:
    """The interval that a validated setting like checkpoint.every names."""
    return parse_interval(text)
