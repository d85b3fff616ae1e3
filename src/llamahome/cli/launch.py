"""launch slurm|k8s|skypilot: prints a complete file to save, look over and hand to that system; nothing is started."""

import re
import shlex
from typing import Annotated

import typer

from llamahome.errors import Problem, UsageError

launch_app = typer.Typer(
    name="launch",
    help="Print a file that starts a training on a cluster or a cloud.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Data = Annotated[str, typer.Argument(help="Data as the machines see it.", metavar="DATA_PATH")]
Nodes = Annotated[int, typer.Option("--num-nodes", min=1, help="Machines.")]
Gpus = Annotated[int, typer.Option("--gpus", min=1, help="GPUs of each machine, one process each.")]
Name = Annotated[str, typer.Option("--name", help="Name of the job and of its folder under output/: letters, digits and dashes.")]

_SLURM = """\
#!/bin/bash
# save as {name}.slurm in the project's folder, which all nodes must see; then: sbatch {name}.slurm
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.log
#SBATCH --signal=USR1@300
# five minutes before its time is over the job saves a checkpoint, ends with 75 and is put into the queue again

set -u
cd "$SLURM_SUBMIT_DIR"
run=output/{name}
words=(train-distributed {data} --output "$run")
if compgen -G "$run/checkpoint-*" > /dev/null; then
  words=(train-resume "$run")
elif [ -d "$run" ]; then
  mv "$run" "$run.$(date +%s)"  # ended before its first checkpoint
fi
status=0
srun --kill-on-bad-exit=0 .venv/bin/llamahome "${{words[@]}}" || status=$?
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""

_K8S = """\
# save as {name}.yaml, put in your image and volume claim; then: kubectl apply -f {name}.yaml
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
      restartPolicy: OnFailure
      terminationGracePeriodSeconds: 300
      containers:
        - name: train
          image: registry.example.org/llamahome:latest
          workingDir: /work
          command: ["/bin/bash", "-c"]
          args:
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
# save as {name}.yaml in the project's folder; then: sky launch -c {name} {name}.yaml
name: {name}
num_nodes: {nodes}
workdir: .
resources:
  accelerators: A100:{gpus}
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
  .venv/bin/llamahome "${{words[@]}}" "${{settings[@]}}"
"""


@launch_app.command()
def slurm(data_path: Data = "data/training/raw", num_nodes: Nodes = 2, gpus: Gpus = 8, name: Name = "llamahome") -> None:
    """Print a batch script for sbatch: one task a GPU, saved and queued again when its time is over."""
    _print(_SLURM, data_path, num_nodes, gpus, name)


@launch_app.command()
def k8s(data_path: Data = "data/training/raw", num_nodes: Nodes = 2, gpus: Gpus = 8, name: Name = "llamahome") -> None:
    """Print a Service and an indexed Job for kubectl: one pod a machine, on a shared volume."""
    _print(_K8S, data_path, num_nodes, gpus, name)


@launch_app.command()
def skypilot(data_path: Data = "data/training/raw", num_nodes: Nodes = 2, gpus: Gpus = 8, name: Name = "llamahome") -> None:
    """Print a task for sky launch: machines of a cloud, checkpoints in a bucket."""
    _print(_SKYPILOT, data_path, num_nodes, gpus, name)


def _print(template: str, data_path: str, num_nodes: int, gpus: int, name: str) -> None:
    """Fill in and print. A name that a cluster would refuse is a mistake in the command line."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", name):
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "llamahome"
        message = f"{name!r} is no name for a job: small letters, digits and dashes"
        raise UsageError(Problem(code="usage.bad-choice", message=message, where="--name", hint=f"--name {near}"))
    print(template.format(data=shlex.quote(data_path), nodes=num_nodes, gpus=gpus, world=num_nodes * gpus, name=name), end="")
