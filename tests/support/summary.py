"""What is known about a run before its first step, for the tests of what is shown of it."""

from llamahome.monitoring.display import RunSummary

SUMMARY = RunSummary(
    run_id="20261122-071405-brisk-otter",
    model="smollm2-135m-instruct",
    method="lora",
    trained_share=0.0352,
    train_rows=368,
    eval_rows=32,
    mean_tokens=197.2,
    target_share=0.24,
    batch_size=32,
    tokens_per_step=6304,
    micro_batch_tokens=2048,
    processes=1,
    horizon=36,
    epochs=3,
    folder="output/runs/20261122-071405-brisk-otter",
)
