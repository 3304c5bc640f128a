"""From an artifact to the callable that users get: tensors, pieces and stitching code, bound together.

Cold and warm starts both end here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from inspect import Parameter, Signature
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch

from stitchcache import errors
from stitchcache.codegen import CodeObjects
from stitchcache.keys.environment import environment_factors
from stitchcache.runtime import as_it_is, build_call, link
from stitchcache.state import HOLDERS, bind_tensors, modules_of
from stitchcache.torchside import has_fakes
from stitchcache.types import Artifact, Change, Check

if TYPE_CHECKING:
    from stitchcache.cache import Cache
    from stitchcache.explanation import Explanation
    from stitchcache.keys import TargetKey
    from stitchcache.options import CudaGraphs
    from stitchcache.pipeline.find import Miss
    from stitchcache.runtime.cuda_graphs import Graphs
    from stitchcache.runtime.cuda_sizes import GraphRecord

log = logging.getLogger("stitchcache")

_ANY = Signature([Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)])


class CompiledModel(torch.nn.Module):
    """A model that runs compiled pieces; called as the model itself.

    Calls run without autograd and without autocast, whatever the caller's modes: both were fixed
    when the model was captured. Calls from several threads are safe.

    It can take its model's place as a submodule: it has the model's own parameters, buffers and submodules
    under the same names, and what else it lacks (``config``, ``device``) comes from the model. Methods that
    do come from there call the model's own forward; ``model.forward = compiled.forward`` gives them ours.

    Attributes:
        graph_hash: Names the artifact.
        artifact: What was compiled.
        cache_hit: ``"direct"`` (nothing was traced), ``"graph"`` (traced, pieces from the cache) or
            ``None`` (compiled now).
        timings: Seconds by stage.
        model: The model whose parameters and buffers are bound.
        came_from: The cache where it was found or stored.
        lookup: Label, target key, and the miss of the direct lookup, kept for :meth:`explain`. ``None`` for
            one that was loaded by its graph hash.
        changed: Tells whether a model is another one than was compiled; ``None`` where nothing tells.
        check: How the look at the model itself on the example stands.
        mismatches: Calls that did not fit and that the model served itself, by argument.
        cuda_graphs: Its CUDA graphs; ``None`` where none were asked for.
    """

    # Calling an object looks __call__ up in its class and binds it; a slot binds to what is in it. So a
    # call goes straight to the generated function, without a frame and a second packing of arguments.
    __slots__ = ("__call__",)

    # A module's own would take the model for a submodule. Hooks and registries are the model's: nothing here
    # needs what torch's __init__ makes.
    __setattr__ = object.__setattr__  # type: ignore[assignment]

    def __init__(
        self,
        artifact: Artifact,
        model: torch.nn.Module,
        pieces: Mapping[str, Any],
        constants: Mapping[str, torch.Tensor],
        *,
        cache_hit: str | None = None,
        objects: CodeObjects | None = None,
        cuda_graphs: CudaGraphs | None = None,
    ) -> None:
        self.artifact = artifact
        self.graph_hash = artifact.graph_hash
        self.cache_hit = cache_hit
        self.timings: dict[str, float] = {}
        self._pieces = dict(pieces)
        self._constants = dict(constants)
        self._objects = objects if objects is not None else CodeObjects()
        self.came_from: Cache | None = None
        self.lookup: tuple[str, TargetKey, Miss | None] | None = None
        self.changed: Callable[[torch.nn.Module], Change | None] | None = None
        self.check = Check(state="unchecked", reason="it was not compared with the model")
        self.mismatches: dict[str, int] = {}
        self._refusal: errors.StitchCacheError | None = None
        self._eager: tuple[str, Callable[[str], None]] | None = None
        self._wanted_graphs = cuda_graphs
        self.cuda_graphs: Graphs | None = None
        self.__signature__ = _ANY
        self._bind(model)

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Run the model, on arguments as in the example and within its ranges.

            Raises:
                InputMismatchError: The capture does not cover this call, or the model chooses another adapter
                    than when it was bound; names the argument, or the attribute.
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
        except errors.BindError:
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
            OptionError: ``model`` is no module.
            BindError: The model does not fit, or would trace to something else; the old one stays bound.
        """
        errors.check_kind("model", model, torch.nn.Module, "a torch.nn.Module")
        # First what a caller can see: a name, a shape. A key that differs says less about it.
        self._bound_to(model)
        if self.changed is not None:
            refuse_change(self.changed(model), self.artifact, model, trusted=trust_model)
        self._bind(model)
        return self

    @property
    def graphs(self) -> tuple[GraphRecord, ...]:
        """Calls that were recorded as CUDA graphs, with seconds and bytes, and those that could not be."""
        return self.cuda_graphs.records if self.cuda_graphs is not None else ()

    def refuse(self, error: errors.StitchCacheError) -> None:
        """Let each call raise an error from now on, also after :meth:`rebind`."""
        self._refusal = error
        self._bind(self.model)

    @property
    def status(self) -> str:
        """What serves calls: ``"compiled"``. With ``on_miss="eager"`` it may be something else at first."""
        return "compiled"

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the compiled model serves calls, at most so many seconds; whether it does."""
        return True

    def on_ready(self, callback: Callable[[CompiledModel], None]) -> None:
        """Call something once the compiled model serves calls: here, at once."""
        errors.check_kind("callback", callback, Callable, "a function of one argument")
        callback(self)

    def leave_misfits(self, device: str, noted: Callable[[str], None]) -> None:
        """From now on let the model itself serve calls that do not fit (``on_mismatch="eager"``).

        ``noted`` gets the name of the argument. The model also serves where this object is refused.
        """
        self._eager = (device, noted)
        self._bind(self.model)

    def _unless_misfit(
        self, call: Callable[..., Any], eagerly: Callable[..., Any], noted: Callable[[str], None]
    ) -> Callable[..., Any]:
        """A compiled call that leaves to the model what does not fit the contract, and notes each mismatch.

        ``call`` raises ``InputMismatchError`` before anything runs, where arguments do not fit.
        """
        own = getattr(call, "__code__", None)

        def serve(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except errors.InputMismatchError as error:
                codes = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
                if any(code.co_filename.startswith("<stitchcache ") and code is not own for code in codes):
                    # Raised by a compiled model that a splitting op calls. Pieces have run before it and may
                    # have written, so the model must not run a second time.
                    raise
                if error.argument not in self.mismatches:
                    log.warning("%s: the model itself serves the call: %s", self.artifact.label, error)
                self.mismatches[error.argument] = self.mismatches.get(error.argument, 0) + 1
                noted(error.argument)
            return eagerly(*args, **kwargs)

        return serve

    def explain(self) -> Explanation:
        """Say how this came about: the kind of hit, and why it was not a direct one if it was not.

        Nothing is looked up for it; what a miss found out was kept.

        Returns:
            A record; ``str()`` of it is for people.
        """
        from stitchcache.explanation import Explanation

        # There is no artifact as long as the model itself serves.
        artifact = vars(self).get("artifact")
        label, key, miss = self.lookup or (artifact.label if artifact else "", None, None)
        reason = "" if self.lookup is not None else "it was loaded by its graph hash"
        return Explanation(
            label=label,
            hit=self.cache_hit,
            reason=reason if miss is None else miss.reason,
            target_key=None if key is None else key.key,
            graph_hash=artifact.graph_hash if artifact else "",
            factors=() if key is None else key.factors,
            changed={} if miss is None else miss.changed,
            nearest=None if miss is None else miss.nearest,
            seconds=dict(self.timings),
            check=self.check,
            status=self.status,
            mismatches=dict(self.mismatches),
        )

    def __repr__(self) -> str:
        hit = self.cache_hit or "compiled"
        name = errors.visible(self.artifact.label) or type(self.model).__name__
        return f"<CompiledModel {name} {self.graph_hash[:12]} {hit}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.timings.items())
        return self.artifact._repr_html_(
            ("came about", f"{self.cache_hit} hit" if self.cache_hit else "compiled"),
            ("seconds", stages),
            ("compared with the model", self.check.state),
        )

    def __reduce__(self) -> NoReturn:
        """Refused: what is mapped into this process means nothing to another one."""
        # One that is still eager has no graph hash.
        name = vars(self).get("graph_hash", "GRAPH HASH")[:12]
        raise TypeError(
            "a CompiledModel cannot be pickled or copied. Send the model and the graph hash, and call "
            f"stitchcache.load({name!r}, model) there: it maps the same files."
        )

    def _bind(self, model: torch.nn.Module) -> None:
        if self._refusal is None:
            call, self._tensors, self.cuda_graphs = self._bound_to(model)
        else:
            call, self._tensors, self.cuda_graphs = self.raise_refusal, {}, None
        if self._eager is not None:
            eagerly = as_it_is(model, self._eager[0])
            if self._refusal is None:
                call = self._unless_misfit(call, eagerly, self._eager[1])
            else:
                log.warning("%s: the model itself serves all calls: %s", self.artifact.label, self._refusal)
                call = eagerly
        self._stand_for(model, call)

    def _stand_for(self, model: torch.nn.Module, call: Callable[..., Any]) -> None:
        """Take a model's place: with its tensors and submodules, and this to call."""
        self.__call__ = self.forward = call  # type: ignore[method-assign]
        self.model = model
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self._non_persistent_buffers_set = model._non_persistent_buffers_set

    def __getattr__(self, name: str) -> Any:
        """What the model has."""
        if name == "model":
            raise AttributeError("a CompiledModel that is not bound has no model")
        return getattr(self.model, name)

    def train(self, mode: bool = True) -> Self:
        """Do nothing: compiled code is for inference, also where the model around it is trained."""
        return self

    def raise_refusal(self, *_args: Any, **_kwargs: Any) -> None:
        """Raise what :meth:`refuse` got, if it got anything. Each call comes here from then on."""
        if self._refusal is not None:
            # A fresh one each time: a shared exception would collect the tracebacks of all threads.
            raise copy(self._refusal)

    def _bound_to(
        self, model: torch.nn.Module
    ) -> tuple[Callable[..., Any], dict[str, torch.Tensor], Graphs | None]:
        tensors = bind_tensors(self.artifact.bindings, model, self._constants)
        linked = partial(link, self.artifact, self._pieces, tensors, self._objects)
        graphs = None
        # Without data there is nothing to record: a prewarm without weights.
        if self._wanted_graphs is not None and not has_fakes(tensors.values()):
            # Most starts have no graphs.
            from stitchcache.runtime.cuda_graphs import Graphs

            graphs = Graphs(self._wanted_graphs, self.artifact, tensors.values(), linked, self.timings)
        function = graphs.call if graphs else linked()
        if any(isinstance(module, HOLDERS) for _, module in modules_of(model)):
            # Most models hold no parts to choose from.
            from stitchcache.runtime.choices import over_choices

            function = over_choices(function, model)
        return build_call(function, self.artifact, tensors, model.forward, self._objects), tensors, graphs


def refuse_change(
    change: Change | None, artifact: Artifact, model: torch.nn.Module, *, trusted: bool
) -> None:
    """Refuse a model that is another one than was compiled.

    One that nothing can be told of is taken where it is ``trusted``.

    Raises:
        BindError: It is another one, or nothing can be told of it.
    """
    if change is None or (change.unknown and trusted):
        return
    name, cls = artifact.graph_hash[:12], type(model).__qualname__
    message = f"entry {name} was compiled from another model: {change}. Compile this {cls} instead."
    if change.unknown:
        message = (
            f"nothing shows that this {cls} is what entry {name} was compiled from: {change}. "
            "Compile the model, or pass trust_model=True if you know that it is."
        )
    raise errors.BindError(message, name=change.name, expected=change.was, actual=change.now)


def check_environment(artifact: Artifact, where: str) -> None:
    """Refuse pieces that were compiled for another processor, GPU, libc or torch.

    A library with instructions that this processor lacks kills the process, so nothing of it is mapped before
    this. Target keys and graph hashes cover the same factors; this is for roads that compute neither.

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
            raise errors.EnvironmentMismatchError(
                f"{where} was made for another environment: {factor.name} was {before} and is "
                f"{factor.value!r} here. Compile the model here.",
                factor=factor.name,
                expected="" if old is None else old.value,
                actual=factor.value,
            )


def devices_in(artifact: Artifact) -> set[str]:
    """Device types of the tensors that an artifact takes."""
    tensors = [leaf.tensor for leaf in artifact.leaves] + [binding.tensor for binding in artifact.bindings]
    # An engine's entry says nothing about tensors, and whether a GPU was in use by a factor.
    used = {"cuda"} if any(factor.name == "env.gpu" for factor in artifact.factors) else set()
    return {tensor.device for tensor in tensors if tensor is not None} | used or {"cpu"}
