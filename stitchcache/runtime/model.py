"""The callable that users get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any

import torch

from stitchcache.codegen.execution import CodeObjects
from stitchcache.errors import BindError, EntryFormatError, StitchCacheError
from stitchcache.runtime.call import build_call
from stitchcache.runtime.link import bind_tensors, link
from stitchcache.types import Artifact, Change, Check

if TYPE_CHECKING:
    from stitchcache.explanation import Explanation, MissFacts
    from stitchcache.keys.target import TargetKey

_ANY = Signature([Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)])


class CompiledModel:
    """A model that runs compiled pieces; called as the model itself.

    Calls run without autograd and without autocast, whatever the caller's modes: both were fixed
    when the model was captured. Calls from several threads are safe.

    Attributes:
        graph_hash: Names the artifact.
        artifact: What was compiled.
        cache_hit: ``"direct"`` (nothing was traced), ``"graph"`` (traced, pieces from the cache) or
            ``None`` (compiled now).
        timings: Seconds by stage.
        model: The model whose parameters and buffers are bound.
        lookup: Label, target key, why there was no direct hit, and what that miss found out: kept for
            :meth:`explain` as it is. ``None`` for one that was loaded by its graph hash.
        changed: Tells whether a model is another one than was compiled; ``None`` where nothing tells.
        check: How the look at the model itself on the example stands.
    """

    # Calling an object looks __call__ up in its class and binds it; a slot binds to what is in it. So a
    # call goes straight to the generated function, without a frame and a second packing of arguments.
    __slots__ = ("__call__", "__dict__", "__weakref__")

    def __init__(
        self,
        artifact: Artifact,
        model: torch.nn.Module,
        pieces: Mapping[str, Any],
        constants: Mapping[str, torch.Tensor],
        *,
        cache_hit: str | None = None,
        timings: Mapping[str, float] | None = None,
        objects: CodeObjects | None = None,
    ) -> None:
        self.artifact = artifact
        self.graph_hash = artifact.graph_hash
        self.cache_hit = cache_hit
        self.timings = dict(timings or {})
        self._pieces = dict(pieces)
        self._constants = dict(constants)
        self._objects = objects if objects is not None else CodeObjects()
        self.model = model
        self.lookup: tuple[str, TargetKey, str, MissFacts | None] | None = None
        self.changed: Callable[[torch.nn.Module], Change | None] | None = None
        self.check = Check(state="unchecked", reason="it was not compared with the model")
        self._refusal: StitchCacheError | None = None
        self.__signature__ = _ANY
        self._bind(model)

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Run the model.

            Args:
                *args: As the capture's example, within its ranges.
                **kwargs: Likewise.

            Returns:
                What the model returns, in the same containers.

            Raises:
                InputMismatchError: The capture does not cover this call; names the argument.
            """

    def is_current(self) -> bool:
        """Whether a trace of the bound model would still be the one that was compiled.

        Computes the target key and reads the recorded sources again, as a start does; nothing is traced.
        False also where a parameter or buffer was replaced by another tensor, which calls do not see before
        :meth:`rebind`, and where no key stands for the model, as nothing can be told of it then.
        """
        if self.changed is None or self.changed(self.model) is not None:
            return False
        try:
            now = bind_tensors(self.artifact.bindings, self.model, self._constants)
        except BindError:
            return False
        return all(now[name] is tensor for name, tensor in self._tensors.items())

    def rebind(self, model: torch.nn.Module, *, trust_model: bool = False) -> CompiledModel:
        """Use another model's parameters and buffers from the next call on.

        Needed when parameters were replaced by other tensors; a change in place is seen without it.

        Args:
            model: Has the same names, shapes, strides, dtypes and device type, and would trace to the same.
            trust_model: Take it although nothing can be told of it, as it holds something that no key
                stands for.

        Returns:
            This object.

        Raises:
            BindError: The model does not fit, or would trace to something else; the old one stays bound.
        """
        # First what a caller can see: a name, a shape. A key that differs says less about it.
        self._bound_to(model)
        if self.changed is not None:
            refuse_change(self.changed(model), self.artifact, model, trusted=trust_model)
        self._bind(model)
        self.model = model
        return self

    def refuse(self, error: StitchCacheError) -> None:
        """Let each call raise an error from now on, also after :meth:`rebind`."""
        self._refusal = error
        self._bind(self.model)

    def explain(self) -> Explanation:
        """Say how this came about: the kind of hit, and why it was not a direct one if it was not.

        Nothing is looked up for it; what a miss found out was kept.

        Returns:
            A record; ``str()`` of it is for people.
        """
        from stitchcache.explanation import explained

        return explained(self.lookup, self.artifact, self.cache_hit, self.timings, self.check)

    def __repr__(self) -> str:
        hit = self.cache_hit or "compiled"
        name = self.artifact.label or type(self.model).__name__
        return f"<CompiledModel {name} {self.graph_hash[:12]} {hit}>"

    def _bind(self, model: torch.nn.Module) -> None:
        call, self._tensors = self._bound_to(model) if self._refusal is None else (self.raise_refusal, {})
        self.__call__ = call  # type: ignore[method-assign]

    def raise_refusal(self, *_args: Any, **_kwargs: Any) -> None:
        """Raise what :meth:`refuse` got, if it got anything. Each call comes here from then on."""
        if self._refusal is not None:
            # A fresh one each time: a shared exception would collect the tracebacks of all threads.
            raise copy(self._refusal)

    def _bound_to(self, model: torch.nn.Module) -> tuple[Callable[..., Any], dict[str, torch.Tensor]]:
        if self.artifact.input_spec is None or self.artifact.output_spec is None:
            raise EntryFormatError(
                f"entry {self.graph_hash[:12]} was made through the engine API and says nothing about "
                "arguments; link it with compile_execution_fn.",
                field="input_spec",
                reason="missing",
            )
        tensors = bind_tensors(self.artifact.bindings, model, self._constants)
        function = link(self.artifact, self._pieces, tensors, self._objects)
        return build_call(function, self.artifact, tensors, model.forward, self._objects), tensors


def refuse_change(
    change: Change | None, artifact: Artifact, model: torch.nn.Module, *, trusted: bool
) -> None:
    """Refuse a model that is another one than was compiled.

    Args:
        change: What tells them apart; ``None`` where nothing does.
        artifact: What was compiled.
        model: The model.
        trusted: Whether one that nothing can be told of is taken.

    Raises:
        BindError: It is another one, or nothing can be told of it.
    """
    if change is None or (change.unknown and trusted):
        return
    name, cls = artifact.graph_hash[:12], type(model).__qualname__
    if change.unknown:
        message = (
            f"nothing shows that this {cls} is what entry {name} was compiled from: {change}. "
            "Compile the model, or pass trust_model=True if you know that it is."
        )
    else:
        message = f"entry {name} was compiled from another model: {change}. Compile this {cls} instead."
    raise BindError(message, name=change.name, expected=change.was, actual=change.now)
