"""launch slurm|k8s|skypilot: prints a complete file to save, read and submit to that system; starts nothing."""

import re
import shlex

import click

from llamahome.cli import options
from llamahome.errors import Problem, UsageError


@click.group("launch", cls=options.Group)
def launch_app() -> None:
    """Print a file that starts a training on a cluster or a cloud."""


_job_options = options.together(
    click.argument("data_path", default="data/training/raw", help="Data as the machines see it; data/training/raw by default."),
    click.option("--num-nodes", type=click.IntRange(min=1), default=2, help="Machines."),
    click.option("--gpus", type=click.IntRange(min=1), default=8, help="GPUs of each machine, one process each."),
    click.option(
        "--name", default="llamahome", help="Name of the job and of its folder under output/: lower-case letters, digits and dashes."
    ),
)

_NOTICE_S = 300
"""How long before the end a run is told to save, and how long a pod may take for it: a step, and the save of a large model."""

_SLURM = """\
#!/bin/bash
# save as {name}.slurm in the project's folder, on a file system that all nodes share; then: sbatch {name}.slurm
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.log
#SBATCH --signal=B:USR1@{notice}
# {notice} s before its time limit this script gets USR1: the run saves a checkpoint, and the job is queued again.
# After a failed node or a preemption Slurm queues it again by itself.

set -u
cd "$SLURM_SUBMIT_DIR"
run=output/{name}
words=(train-distributed {data} --output "$run")
if compgen -G "$run/checkpoint-*" > /dev/null; then
  words=(train-resume "$run")
elif [ -d "$run" ]; then
  mv "$run" "$run.$(date +%s)"  # it ended before its first checkpoint
fi
asked=0
step=""
trap 'asked=1; [ -z "$step" ] || kill -USR1 "$step"' USR1
srun --kill-on-bad-exit=0 .venv/bin/llamahome "${{words[@]}}" &
step=$!
[ "$asked" -eq 0 ] || kill -USR1 "$step"  # the signal came before there was a step
status=0
wait "$step" || status=$?
while kill -0 "$step" 2> /dev/null; do  # the signal ended the first wait
  status=0
  wait "$step" || status=$?
done
if [ "$status" -eq 75 ] || {{ [ "$asked" -eq 1 ] && [ "$status" -gt 128 ]; }}; then  # saved, or left before there was anything to save
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""

_K8S = """\
# save as {name}.yaml with your image and volume claim; then: kubectl apply -f {name}.yaml
apiVersion: v1
kind: Service
metadata:
  name: {name}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    job-name: {name}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  completionMode: Indexed
  completions: {nodes}
  parallelism: {nodes}
  backoffLimit: 20
  template:
    spec:
      subdomain: {name}
      restartPolicy: OnFailure  # status 75, a stop with a checkpoint, starts the pod again, and it goes on
      # a pod that is evicted or drained gets SIGTERM and so many seconds to finish its step and save
      terminationGracePeriodSeconds: {notice}
      containers:
        - name: train
          image: registry.example.org/llamahome:latest
          workingDir: /work
          command: ["/bin/bash", "-c"]
          args:  # exec, so that SIGTERM reaches the run and not the shell
            - |
              words=(train-distributed {data} --output output/{name})
              if compgen -G "output/{name}/checkpoint-*" > /dev/null; then
                exec llamahome train-resume output/{name} --set distributed.node_rank="$JOB_COMPLETION_INDEX"
              fi
              exec llamahome "${{words[@]}}" --num-nodes {nodes} --world-size {world} --node-rank "$JOB_COMPLETION_INDEX" \\
                --master-addr {name}-0.{name} --set distributed.join_timeout="10 min"
          resources:
            limits:
              nvidia.com/gpu: {gpus}
          volumeMounts:
            - name: work
              mountPath: /work
            - name: shared-memory
              mountPath: /dev/shm
      volumes:
        - name: work
          persistentVolumeClaim:
            claimName: llamahome-work
        - name: shared-memory
          emptyDir:
            medium: Memory
"""

_SKYPILOT = """\
# save as {name}.yaml in the project's folder; then: sky jobs launch -n {name} {name}.yaml
# A managed job starts again on new machines when a spot machine is taken back, and goes on from the newest checkpoint in the bucket.
name: {name}
num_nodes: {nodes}
workdir: .
resources:
  accelerators: A100:{gpus}
  use_spot: true
  job_recovery:
    max_restarts_on_errors: 3
file_mounts:
  /work:
    name: {name}-work
    mode: MOUNT
setup: |
  make setup
run: |
  words=(train-distributed {data} --output /work/{name})
  if compgen -G "/work/{name}/checkpoint-*" > /dev/null; then
    words=(train-resume /work/{name})
    settings=(--set distributed.node_rank="$SKYPILOT_NODE_RANK" --set distributed.master_addr="$(echo "$SKYPILOT_NODE_IPS" | head -n1)")
  else
    settings=(--num-nodes {nodes} --world-size {world} --node-rank "$SKYPILOT_NODE_RANK"
      --master-addr "$(echo "$SKYPILOT_NODE_IPS" | head -n1)" --set distributed.join_timeout="10 min")
  fi
  .venv/bin/llamahome "${{words[@]}}" "${{settings[@]}}" &
  run=$!
  trap 'kill -TERM "$run"' TERM
  # Two minutes before it takes a spot machine back, AWS answers here with 200; Google's and Azure's machines send SIGTERM themselves.
  notice() {{
    local meta=http://169.254.169.254/latest token
    token=$(curl -fsm 2 -X PUT "$meta/api/token" -H "X-aws-ec2-metadata-token-ttl-seconds: 60") || return 1
    curl -fsm 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$meta/meta-data/spot/instance-action"
  }}
  while kill -0 "$run" 2> /dev/null; do
    if notice; then
      kill -USR1 "$run"
      break
    fi
    sleep 5 & wait $!
  done
  status=0
  wait "$run" || status=$?
  while kill -0 "$run" 2> /dev/null; do  # a signal ended the wait
    status=0
    wait "$run" || status=$?
  done
  exit "$status"
"""


@launch_app.command()
@_job_options
def slurm(data_path: str, num_nodes: int, gpus: int, name: str) -> None:
    """Print a batch script for sbatch: one task per GPU; when its time is over, it saves and queues itself again."""
    _print(_SLURM, data_path, num_nodes, gpus, name)


@launch_app.command()
@_job_options
def k8s(data_path: str, num_nodes: int, gpus: int, name: str) -> None:
    """Print a Service and an indexed Job for kubectl: one pod per machine, on a shared volume."""
    _print(_K8S, data_path, num_nodes, gpus, name)


@launch_app.command()
@_job_options
def skypilot(data_path: str, num_nodes: int, gpus: int, name: str) -> None:
    """Print a task for sky launch: machines of a cloud, checkpoints in a bucket."""
    _print(_SKYPILOT, data_path, num_nodes, gpus, name)


def _print(template: str, data_path: str, num_nodes: int, gpus: int, name: str) -> None:
    """Fill in the template and print it; raises UsageError for a name that a cluster would refuse."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", name):
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "llamahome"
        message = f"{name!r} is not a valid job name: use lower-case letters, digits and dashes"
        raise UsageError(Problem(code="usage.bad-choice", message=message, where="--name", hint=f"--name {near}"))
    print(
        template.format(data=shlex.quote(data_path), nodes=num_nodes, gpus=gpus, world=num_nodes * gpus, name=name, notice=_NOTICE_S),
        end="",
    )
