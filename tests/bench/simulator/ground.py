"""Where the simulator is compared with the service: which model, on what, under which load."""

from dataclasses import dataclass
from pathlib import Path

from app.local_process import RunFolder

FOLDER = RunFolder(Path(".run/simulator"))
# Nobody is refused, and every prompt takes the way that the deployment is about.
TTFT_S, ITL_S, MIN_REMOTE_TOKENS = 60.0, 1.0, 16
# Replicas of prefill and of decode.
DEPLOYMENTS = {"colocated": (0, 1), "1 + 1": (1, 1), "2 + 2": (2, 2)}


@dataclass(frozen=True, slots=True)
class Ground:
    """See the module.

    Attributes:
        model: its name in the API.
        scenario: file of the load.
        max_num_batched_tokens: of a step.
        block_size: of the engines' KV pools, in tokens.
        has_shared_cores: engines compute on the same cores; else each has a GPU.
        deployments: that are measured unless told otherwise.
        arguments: of the application, for this model.
        gpus: names of those that there are.
    """

    model: str
    scenario: Path
    max_num_batched_tokens: int
    block_size: int
    has_shared_cores: bool
    deployments: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()

    def arguments_of(self, deployment: str) -> list[str]:
        """Of the application."""
        num_prefill, num_decode = DEPLOYMENTS[deployment]
        counts = {"decode": num_decode} | ({"prefill": num_prefill} if num_prefill else {})
        sizes = [f"{pool}.{end}_replicas={count}" for pool, count in counts.items() for end in ("min", "max")]
        gpus = [] if self.has_shared_cores else [f"{pool}.num_gpus=1" for pool in counts]
        apart = [f"min_remote_prefill_tokens={MIN_REMOTE_TOKENS}", "parity_check=false"]
        common = [f"engine.max_num_batched_tokens={self.max_num_batched_tokens}", f"ingress.max_ttft_s={TTFT_S}"]
        return [*self.arguments, *common, *sizes, *gpus, *(apart if num_prefill else ["mode=colocated"])]


def ground_of(shape: str | None) -> Ground:
    """The default model on the cores of this machine, or one of `gpu_shapes`, with random weights, on its GPUs."""
    here = Path(__file__).parent
    if shape is None:
        return Ground("smollm2-135m-instruct", here / "small.yaml", 128, 16, True, ("colocated", "1 + 1"))
    # Not above: it brings torch and transformers into the process that plays the load.
    from tests.bench.two_gpus.model import gpu_names, write_model

    folder = FOLDER.path / shape
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, shape)
    model = f"model={folder.resolve()}", "engine.max_model_len=16384"
    return Ground(shape, here / "gpus.yaml", 8192, 256, False, ("1 + 1",), model, tuple(gpu_names()))
