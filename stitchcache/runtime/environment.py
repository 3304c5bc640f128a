"""Whether an artifact's pieces may be loaded on this machine: compared before anything is mapped."""

from __future__ import annotations

from stitchcache.errors import EnvironmentMismatchError
from stitchcache.keys.environment import environment_factors
from stitchcache.types import Artifact


def check_environment(artifact: Artifact, where: str) -> None:
    """Refuse pieces that were compiled for another processor, GPU, libc or torch.

    A library with instructions that this processor lacks kills the process, so nothing of it is mapped before
    this. Target keys and graph hashes cover the same factors; this is for roads that compute neither.

    Args:
        artifact: What is to be loaded.
        where: What to call it in the error.

    Raises:
        EnvironmentMismatchError: A factor of the environment is another one now; names it and both values.
    """
    stored = {factor.name: factor for factor in artifact.factors}
    # The one that was asked for: single pieces may run op by op all the same.
    asked = stored.get("options.backend") or stored.get("request.backend")
    for factor in environment_factors(asked.value if asked is not None else "eager", devices_in(artifact)):
        old = stored.get(factor.name)
        if old is None or old.digest != factor.digest:
            before = "not recorded" if old is None else repr(old.value)
            raise EnvironmentMismatchError(
                f"{where} was made for another environment: {factor.name} was {before} and is "
                f"{factor.value!r} here. Compile the model here.",
                factor=factor.name,
                expected="" if old is None else old.value,
                actual=factor.value,
            )


def devices_in(artifact: Artifact) -> set[str]:
    """Device types of the tensors that an artifact takes."""
    leaves = artifact.input_spec.leaves if artifact.input_spec is not None else ()
    tensors = [leaf.tensor for leaf in leaves] + [binding.tensor for binding in artifact.bindings]
    return {tensor.device for tensor in tensors if tensor is not None} or {"cpu"}
