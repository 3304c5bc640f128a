"""The private names of torch that stitchcache uses, one file a subject.

Other rooms import from here what torch does not promise to keep, so that a new version of torch is looked at
in one place. Each file says in ``SEEN`` with which minor versions of torch the tests were run.

Private is what begins with an underscore, in a module's path or in an attribute, and the fields of symbolic
sizes and fake tensors. Three names are taken as public, because ``nn.Module`` declares them with their types
and every tool that walks over modules reads them: ``_parameters``, ``_buffers`` and ``_modules``.

Nothing is imported here: a warm start pays only for the files that it needs.
"""
