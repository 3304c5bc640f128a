"""Three verbs over values that do not change: ``find``, ``make`` and ``start``.

``find`` says what a start can be served from (``Hit``) or why nothing is served (``Miss``). ``make`` compiles
what the cache lacks. ``start`` makes an artifact callable. Every public verb is a short path through them.

The walk of a **direct hit** (``stitchcache.compile``, nothing is traced):

1. ``api.compile.compile`` puts the options into a ``Request``, which checks them.
2. ``find.want`` computes the target key from model, example, request and environment: a ``Wanted``.
3. ``find.find`` reads the key's target records and checks sources and globals of each, newest first.
4. ``find.find_by_graph`` reads and verifies the entry that the record names: a ``Hit``.
5. ``start.start`` holds the entry's files while they are opened.
6. ``start.load_blobs`` verifies and maps each distinct piece.
7. ``runtime.model.CompiledModel`` binds tensors, pieces and stitching code.
8. ``look.looker`` gave a look, which runs the model and the callable on the example and compares.
9. ``start.start_with`` counts the start and writes its log line.

The walk of a **graph hit** (no direct hit; steps 1 to 3 as above, ending in a ``Miss``):

1. ``trace.compile_traced`` asks ``miss.miss_facts`` what the miss can tell, and has the compiler warmed up.
2. ``source.export_source`` captures the model, with a recorder of what ran and what was read: a ``Source``.
3. ``entry.plan_entry`` splits its graphs, makes pieces self-contained, and hashes all: an ``EntryPlan``.
4. ``trace.compile_planned`` looks the hash up with ``find.find_by_graph``: a ``Hit``.
5. ``start.start`` as above.
6. ``trace._put_target`` lets the target key lead to the entry from now on.

The walk of a **cold compile** (as a graph hit up to step 4, which gives a ``Miss``):

1. ``trace.compile_planned`` takes the lock of the graph hash, and looks again.
2. ``make.make`` takes those pieces that other models have left.
3. ``pieces.build.build`` compiles the others in child processes, which compare them with eager.
4. ``entry.assemble`` writes the stitching code: an ``Artifact``.
5. ``start.start`` links the pieces that are loaded already, looks, and stores the entry.
6. ``trace._put_target`` lets the target key lead to the entry.

The walk of ``stitchcache.load``:

1. ``find.find_by_graph`` reads and verifies the entry.
2. ``runtime.model.check_environment`` compares this machine with the one that compiled.
3. ``find.first_change`` compares the kind of model.
4. ``start.start`` as above, without a look: there is no example.

The walk of ``torch.compile(model, backend="stitchcache")``, for each of Dynamo's graphs:

1. ``api.dynamo.compile_graph`` sorts the options into a ``Request``.
2. ``source.dynamo_source`` traces the graph down to the ops of ``torch.export``: a ``Source``.
3. ``entry.plan_entry``, ``trace.compile_planned`` and, where it misses, ``make.make`` as above.
4. ``start.start_with`` links a ``CompiledGraph`` in place of a ``CompiledModel``.
"""
