"""Mutated input with right digests and signatures: only our own refusals come out, soon, in little memory.

50,000 executions, and 1,000,000 with ``STITCHCACHE_FULL=1``; ``-s`` shows what each surface took. A failure
names its surface and number: ``SURFACES["payload"](world, Mutator("payload 123"))`` runs it again.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import marshal
import os
import resource
import signal
import struct
import sys
import time
from pathlib import Path

import msgpack
import pytest

pytest.importorskip("cryptography")
sys.path.insert(0, str(Path(__file__).parent.parent / "store"))
sys.path.insert(0, str(Path(__file__).parent.parent / "cli"))
sys.path.insert(0, str(Path(__file__).parent.parent / "ext"))

import torch
from cli_entries import artifact as rich_artifact
from mutate import SIZES, Mutator
from signing import new_keys
from stores import key

from stitchcache.artifact.consts import dump_consts, load_consts
from stitchcache.artifact.entry import (
    OUTSIDE,
    PRELUDE,
    Kind,
    PieceRecord,
    decode_header,
    decode_named,
    decode_piece,
    decode_signed,
    encode,
    encode_piece,
    encode_target,
    header_end,
    open_frame,
    pack_factors,
    packed_digest,
    seal,
    signature_in,
    signed_digest,
    unpack_factors,
)
from stitchcache.cache import Cache
from stitchcache.codegen import CodeObjects
from stitchcache.codegen.gate import check_code
from stitchcache.errors import EntryFormatError, LinkError, UntrustedEntryError
from stitchcache.ext.bundle import header, import_bundle, place
from stitchcache.pieces import get_backend
from stitchcache.pieces.eager import _MAGIC as EAGER
from stitchcache.runtime import misfit
from stitchcache.runtime.expressions import check_expression, evaluator, names_in
from stitchcache.store import Area, keyed_path
from stitchcache.store.openssh import Signature, read_signers
from stitchcache.torchside import tree
from stitchcache.types import (
    Artifact,
    Factor,
    InputSpec,
    LeafSpec,
    OutputSpec,
    SourceRef,
    SymbolSpec,
    TargetRecord,
    TensorSpec,
)

FULL = os.environ.get("STITCHCACHE_FULL") == "1"
TIMES = 20 if FULL else 1
MEMORY = 64 << 20
GRAPH = "ab" * 32

CONSTS = [
    float("inf"), complex(1, -0.0), b"a\0", bytearray(b"x"), slice(1, None, -2), range(3), {1, 2},
    frozenset([1]), 10**50, {"a": (1, [2, {"b": None}])}, torch.float32, torch.strided, torch.device("cpu"),
    torch.Size([2, 3]), torch.relu, torch.ops.aten.add.Tensor, torch.ops.aten.add,
    torch.arange(6.0).view(2, 3), torch.nn.Parameter(torch.ones(2)), "\ud800",
]  # fmt: skip
BOUND = """import torch
import operator
def bind(__submods__, __consts__):
    submod_0, submod_2 = __submods__
    const_0, = __consts__
    op_0 = torch.ops.aten.add.Tensor
    op_1 = torch.relu
    def execution_fn(x, s0, flag=True):
        q, k = submod_0(x, s0)
        y = op_0(q, k, alpha=2)
        del q, k
        z = op_1(y)
        view = z.view(s0, -1)
        getitem = view[0, 1:2]
        add = s0 + 1
        w = submod_2(getitem, [1, 2.5, 'layers.0', None], const_0)
        return (w, add, {'a': y})
    return execution_fn
"""
LIST = """import torch
def execution_fn(x, s0, *, __vllm_submods__):
    submod_0 = __vllm_submods__[0](x, s0)
    getitem = submod_0[0]
    add = torch.ops.aten.add.Tensor(getitem, __vllm_consts__[0])
    return __vllm_submods__[1](add)
"""


EXAMPLE = ((torch.ones(2, 4), [torch.ones(4, 8)]), {"flag": True, "count": 3})


def contracted(artifact: Artifact) -> Artifact:
    """The artifact with a contract that the example fulfils."""
    x = TensorSpec(dtype="float32", device="cpu", shape=("s0", 4), stride=(4, 1))
    y = TensorSpec(dtype="float32", device="cpu", shape=("2*s0", "s0**3"), stride=("s0**3", 1))
    leaves = (
        LeafSpec(path="x", kind="tensor", tensor=x),
        LeafSpec(path="y[0]", kind="inout", tensor=y),
        LeafSpec(path="flag", kind="constant", value=True),
        LeafSpec(path="count", kind="symbol", symbol="s0 + 1"),
    )
    spec = InputSpec(
        tree=tree.dumps(tree.flatten(EXAMPLE)[1]),
        leaves=leaves,
        symbols=(SymbolSpec(name="s0", min=1, max=64, label="rows"),),
        constraints=("s0 <= 2*s0", "max(s0, 3) // 2 > 0", "distinct", "plain", "apart"),
    )
    results = tree.dumps(tree.flatten({"a": (x, [x])})[1])
    outputs = OutputSpec(tree=results, count=2, mutations=("buffer:scale", "input:1"))
    return dataclasses.replace(artifact, input_spec=spec, output_spec=outputs)


class World:
    """Good data of every kind, a key, and caches that take what it signs."""

    def __init__(self, directory: Path) -> None:
        self.keys = new_keys(directory / "keys")
        self.cache = Cache(directory / "cache", trust="signed", durability="fast")
        self.cache.keys = self.cache.signers = self.keys
        made = rich_artifact(self.cache, GRAPH, ranged=True)
        codes = zip(made.variants, (BOUND, LIST), strict=True)
        variants = [dataclasses.replace(v, code=code, consts=dump_consts(CONSTS)) for v, code in codes]
        self.artifact = dataclasses.replace(made, variants=tuple(variants))
        self.entry = encode(self.artifact)
        _, header_, payload = open_frame(self.entry, Kind.ENTRY)
        self.header, self.payload = (
            msgpack.unpackb(part, unicode_errors="surrogatepass") for part in (header_, payload)
        )
        factors = (Factor(name="env.torch", value="2.13", digest=key("torch")),)
        self.code = marshal.dumps(compile(BOUND, "<stitchcache>", "exec"))
        self.record = TargetRecord(
            graph_hash=GRAPH,
            sources=(SourceRef(module="m", digest=key("m"), size=3),),
            globals=(("m:FLAG", "1"),),
            factors=pack_factors(factors),
            code=((key("code"), self.code),),
        )
        self.target = msgpack.unpackb(
            open_frame(encode_target(key("t"), [self.record] * 2), Kind.TARGET)[2],
            unicode_errors="surrogatepass",
        )
        self.consts = [dump_consts(CONSTS), *(dump_consts([value]) for value in CONSTS)]
        self.model = torch.nn.Linear(4, 3).eval()
        self.contract = msgpack.unpackb(open_frame(encode(contracted(self.artifact)), Kind.ENTRY)[2])
        eager = {"magic": EAGER, "code": BOUND, "names": ["a", "b"], "consts": dump_consts([1.5])}
        values = {"attributes": {"a": dump_consts([torch.ones(2)]), "b": dump_consts([torch.ones(2)])}}
        self.eager = {**eager, **values, "bodies": {}}
        self.piece = directory / "piece.eager"
        self.blobs = {blob.digest: self.cache.blob_path(blob).read_bytes() for blob in self.artifact.blobs}

    def signed(self, kind: Kind, header_: bytes, payload: bytes, name: str) -> bytes:
        """A whole file with a right digest and a right signature."""
        bare = seal(kind, header_, payload)
        return seal(kind, header_, payload, self.keys.sign(kind.name.lower(), name, bare[-32:].hex()))


# -- surfaces: each runs one mutation, and may raise refusals --------------------------------------


def envelope(world: World, mutator: Mutator) -> None:
    """Sizes, versions and kinds, with digests that fit them."""
    data = bytearray(world.entry)
    fields = list(PRELUDE.unpack_from(data))
    for _ in range(mutator.pick((1, 1, 2))):
        at = 1 + mutator.random.randrange(6)
        width = (0, 16, 16, 32, 64, 32, 32)[at]
        new = mutator.pick(
            (
                0,
                1,
                2,
                3,
                4,
                5,
                9,
                fields[at] + 1,
                fields[at] - 1,
                4096,
                4097,
                1 << 24,
                1 << 30,
                (1 << width) - 1,
            )
        )
        fields[at] = new & ((1 << width) - 1)
    PRELUDE.pack_into(data, 0, *fields)
    body = bytes(data[:-32])
    if mutator.random.random() < 0.3:
        body = body[:64] + mutator.bytes(body[64:])
    size = min(fields[3], len(body))
    head = body[:32] + hashlib.sha256(body[:32] + body[64 : 64 + size]).digest()
    body = head + body[64:]
    whole = body + hashlib.sha256(body).digest()
    signature_in(whole)
    for act in (
        lambda: decode_named(whole, GRAPH, "x.stitch"),
        lambda: decode_header(whole[: header_end(whole)], len(whole)),
        lambda: signed_digest(whole, Kind.ENTRY),
    ):
        refused(act)


def payload(world: World, mutator: Mutator) -> None:
    """An entry, to the end: its header, its code at the gate, its consts."""
    header_, body = world.header, world.payload
    if mutator.random.random() < 0.15:
        header_ = mutator.tree(header_)
    else:
        body = mutator.tree(body)
    data = seal(Kind.ENTRY, mutator.packed(header_), mutator.packed(body))
    found = decode_named(data, GRAPH, "x.stitch")
    # As bytes, because a NaN differs from itself.
    assert encode(decode_named(encode(found), GRAPH, "x.stitch")) == encode(found)
    for variant in found.variants:
        refused(lambda variant=variant: load_consts(variant.consts))
        refused(lambda variant=variant: check_code(variant.code, len(variant.submod_names), len(CONSTS)))


def contract(world: World, mutator: Mutator) -> None:
    """An entry whose contract is turned into checks, and an example held against them."""
    body = {**world.contract}
    name = mutator.pick(("input_spec", "input_spec", "output_spec", "bindings"))
    body[name] = mutator.tree(body[name])
    if mutator.random.random() < 0.5:
        at, spec = mutator.pick((0, 1)), world.contract["input_spec"]
        changed = [*spec["constraints"]]
        changed[at] = mutator.text(changed[at], SIZES)
        body["input_spec"] = {**spec, "constraints": changed}
    data = seal(Kind.ENTRY, msgpack.packb(world.header), mutator.packed(body))
    misfit(decode_named(data, GRAPH, "x.stitch"), world.model.forward, *EXAMPLE, CodeObjects())


def expressions(world: World, mutator: Mutator) -> None:
    """Sizes over symbols, checked and evaluated at small, large and absurd values."""
    text = mutator.pick(
        ("s0 + 1", "(2*s0 + s1) // 3", "max(s0, s1) - 1", "s0**2 <= 4*s1", "not s0 % s1 == 0")
    )
    for _ in range(mutator.pick((1, 2, 3))):
        text = mutator.text(text, SIZES)
    refused(lambda: names_in(text))
    check_expression(text, {"s0", "s1"}, "field")
    value = evaluator(text)
    for size in (0, 1, -1, 4096, (1 << 63) - 1):
        refused(lambda size=size: value({"s0": size, "s1": 7}))


def eager_piece(world: World, mutator: Mutator) -> None:
    """A piece that is source and constants."""
    world.piece.write_bytes(mutator.packed(mutator.tree(world.eager)))
    # A name that is not there (a ``LinkError``) is another answer.
    refused(lambda: get_backend("eager").load(world.piece, "cpu"))


def consts(world: World, mutator: Mutator) -> None:
    load_consts(mutator.pickle(mutator.pick(world.consts)))


def gate(world: World, mutator: Mutator) -> None:
    source, submods = mutator.pick(((BOUND, 2), (LIST, 2)))
    # An op that is not here (a ``LinkError``) is the gate's other answer.
    refused(lambda: check_code(mutator.source(source), submods, 1))


def target(world: World, mutator: Mutator) -> None:
    data = seal(Kind.TARGET, b"", mutator.packed(mutator.tree(world.target)))
    for record, _ in decode_signed(data, key("t")):
        packed_digest(record)
        unpack_factors(record.factors)
    piece = encode_piece(PieceRecord(key=key("p"), backend="aoti", blob=world.artifact.blobs[0]))
    tree = msgpack.unpackb(open_frame(piece, Kind.PIECE)[2])
    decode_piece(seal(Kind.PIECE, b"", mutator.packed(mutator.tree(tree))), key("p"))


def code_objects(world: World, mutator: Mutator) -> None:
    """Marshalled bytes that are cut, or of another kind; a signature vouches for what is whole."""
    digest = CodeObjects()
    digest.add("<x>", "source", compile("1", "<x>", "exec"))
    ((name, _),) = digest
    size = struct.pack("<I", mutator.pick((0, 1, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF)))
    huge = struct.pack("<I", mutator.pick((1000, 1 << 20, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)))
    begun = mutator.pick((b"c", b"\xe3")) + mutator.random.randbytes(20) + b"s\0\0\0\0"
    data = mutator.pick((
        world.code[: mutator.random.randrange(len(world.code))],
        # Claims of more than there is, in a code object: marshal would make room for them first.
        begun + bytes([mutator.pick(b"(>\xa8\xbesulaA")]) + huge + b"N" * mutator.pick((0, 9, 900)),
        begun + (b"(" + struct.pack("<I", 900)) * mutator.pick((1, 9, 900)) + b"N" * 900,
        begun + b"i\0\0\0" * mutator.pick((0, 2)),
        marshal.dumps(mutator.tree([1, "a", {"b": 2.5}])),
        bytes([mutator.pick(b"[(<>{sziIylrR?")]) + size,
        b"(" + b"\1\0\0\0(" * 3000,
        mutator.random.randbytes(30).lstrip(b"c\xe3"),
    ))  # fmt: skip
    assert CodeObjects([(name, data)]).get("<x>", "source") is None


def signature(world: World, mutator: Mutator) -> None:
    """Statements that are signed as they are, SSHSIG blocks, and lines of allowed_signers."""
    good = world.keys.sign("entry", GRAPH, GRAPH)
    text = good.decode().partition("-----BEGIN")[0]
    if mutator.random.random() < 0.4:
        text = mutator.text(
            text, ['"', "{", "}", "[" * 900, "1e999", "NaN", "true", "\\u0000", '"version":1,']
        )
        private, public = world.private
        made = Signature(text=text, public=public, namespace="stitchcache", signature=b"")
        if not text.isascii():
            return
        data = Signature(
            text=text, public=public, namespace="stitchcache", signature=private.sign(made.signed)
        ).armored()
    else:
        data = mutator.bytes(good)
    try:
        world.keys.verify(data, "entry", GRAPH, GRAPH, path="p")
    except UntrustedEntryError:
        pass
    line = world.signers.strip()
    read_signers(
        mutator.text(line, ['"', ",", " ", 'namespaces="a"', 'valid-after="20200101Z"', "!", "*", "#", "\0"]),
        "p",
    )


def cached(world: World, mutator: Mutator) -> None:
    """Signed files in a cache that takes signatures alone, through its public methods."""
    body = mutator.packed(mutator.tree(world.payload))
    data = world.signed(Kind.ENTRY, msgpack.packb(world.header), body, GRAPH)
    write(world, Area.ENTRIES, GRAPH, mutator.bytes(data) if mutator.random.random() < 0.2 else data)
    assert world.cache.get(GRAPH) is None or world.cache.get(GRAPH).graph_hash == GRAPH
    tree = mutator.tree(world.target)
    write(world, Area.TARGETS, key("t"), seal(Kind.TARGET, b"", mutator.packed(tree)))
    world.cache.get_target(key("t"))


def bundle(world: World, mutator: Mutator) -> None:
    """A bundle of mutated members, signed as a whole and each for itself."""
    entry = world.signed(
        Kind.ENTRY, msgpack.packb(world.header), mutator.packed(mutator.tree(world.payload)), GRAPH
    )
    records = encode_target(
        key("t"), [world.record], [world.keys.sign("target", key("t"), packed_digest(world.record))]
    )
    whole = mutator.random.random()
    members = {
        keyed_path("", Area.ENTRIES, GRAPH)[1:]: entry if whole < 0.5 else world.signed_entry,
        keyed_path("", Area.TARGETS, key("t"))[1:]: records,
        **{keyed_path("", Area.BLOBS, digest)[1:]: content for digest, content in world.blobs.items()},
    }
    if whole > 0.6:
        name = mutator.pick(sorted(members))
        members[name] = mutator.bytes(members[name])
    names = sorted(members, key=place)
    if whole > 0.9:
        mutator.random.shuffle(names)
    body = b"".join(header(n, len(members[n])) + members[n] + bytes(-len(members[n]) % 512) for n in names)
    if 0.7 < whole < 0.9:
        body = mutator.bytes(body)
    digest = hashlib.sha256(body).hexdigest()
    its = world.keys.sign("bundle", digest, digest)
    data = body + header("signature", len(its)) + its + bytes(-len(its) % 512 + 1024)
    path = world.cache.root.parent / "x.bundle"
    path.write_bytes(mutator.bytes(data) if whole < 0.1 else data)
    import_bundle(world.cache, path)


SURFACES = {
    envelope: 12_000, payload: 8_500, consts: 12_000, gate: 6_000, target: 5_000, expressions: 3_000,
    contract: 1_000, eager_piece: 1_000, code_objects: 500, signature: 700, cached: 150, bundle: 150,
}  # fmt: skip


FEW_REFUSED = (envelope, gate, signature, code_objects, cached, eager_piece)


def write(world: World, area: Area, name: str, data: bytes) -> None:
    path = Path(keyed_path(str(world.cache.root), area, name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def refused(act) -> None:
    try:
        act()
    except (EntryFormatError, UntrustedEntryError, LinkError):
        pass


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("fuzz"))
    made.private = made.keys._private()
    made.signers = Path(made.keys.path("allowed_signers")).read_text()
    made.signed_entry = made.signed(Kind.ENTRY, *open_frame(made.entry, Kind.ENTRY)[1:], GRAPH)
    return made


def test_the_number_of_executions():
    assert sum(SURFACES.values()) * TIMES >= (1_000_000 if FULL else 50_000)


def test_good_data_of_every_kind_is_taken(world):
    """Else the mutations below would all stop at the same wrong byte."""
    assert decode_named(world.signed_entry, GRAPH, "x.stitch") == world.artifact
    assert [load_consts(data) for data in world.consts]
    for source in (BOUND, LIST):
        assert check_code(source, 2, 1)
    data = seal(Kind.ENTRY, msgpack.packb(world.header), msgpack.packb(world.contract))
    found = decode_named(data, GRAPH, "x.stitch")
    assert misfit(found, world.model.forward, *EXAMPLE, CodeObjects()) is None
    world.piece.write_bytes(msgpack.packb(world.eager))
    assert get_backend("eager").load(world.piece, "cpu")
    objects = CodeObjects()
    objects.add("<x>", "source", compile(BOUND, "<x>", "exec"))
    assert objects.get("<x>", "source") == compile(BOUND, "<x>", "exec")
    write(world, Area.ENTRIES, GRAPH, world.signed_entry)
    assert world.cache.get(GRAPH) == world.artifact
    signature = world.keys.sign("target", key("t"), packed_digest(world.record))
    write(world, Area.TARGETS, key("t"), encode_target(key("t"), [world.record], [OUTSIDE + signature]))
    assert world.cache.get_target(key("t")) == (world.record,)


def _again(surface, world, seed) -> float:
    gc.collect()
    began = time.process_time()
    refused(lambda: surface(world, Mutator(seed)))
    return time.process_time() - began


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.__name__)
def test_only_refusals_come_out(surface, world, caplog):
    caplog.set_level("CRITICAL", "stitchcache")
    before, taken, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, (0.0, "")

    def too_long(*_):
        raise TimeoutError

    handler = signal.signal(signal.SIGPROF, too_long)
    try:
        for number in range(SURFACES[surface] * TIMES):
            seed = f"{surface.__name__} {number}"
            began = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, 10.0)
            try:
                surface(world, Mutator(seed))
                taken += 1
            except (EntryFormatError, UntrustedEntryError):
                pass
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not come out
                pytest.fail(f"{seed}: {type(error).__name__}: {error}"[:600])
            spent = time.process_time() - began
            slowest = max(slowest, (spent, seed))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
    # A collection of the whole suite's garbage, or a busy machine, may fall into any one of them.
    assert slowest[0] < 1.0 or min(_again(surface, world, slowest[1]) for _ in range(3)) < 1.0, slowest
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    count = f"{SURFACES[surface] * TIMES} executions of {surface.__name__}, {taken} not refused"
    print(f"{count}; the longest {slowest[0] * 1e3:.0f} ms ({slowest[1]}); memory grew by {grown >> 20} MiB")
    assert grown < MEMORY, f"{grown} bytes"
    # Mutations that are all refused, or all taken, would show nothing.
    assert taken > 0
    assert taken < SURFACES[surface] * TIMES or surface in FEW_REFUSED
