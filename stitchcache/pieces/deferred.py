"""A compiler's commands, written down and run later, side by side.

Inductor compiles wrapper and kernels of a piece one after the other, links them, and waits for each, though
most of a small piece's time goes there. So it is given a stand-in for the compiler. That writes down what
compiles C++ or links, leaves an empty file where a result is expected, and lets the compiler do anything else
at once.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Objects that were made at once are copied: Inductor removes them as soon as it has linked, as it thinks.
_STAND_IN = r"""#!/bin/sh
for argument; do
  case $argument in *.cpp) source=1 ;; -c) compile=1 ;; -shared) link=1 ;; esac
  if [ "$before" = -o ]; then result=$argument; fi
  before=$argument
done
case "$source-$compile-$link-$result" in 1-1--/*.o | --1-/*.so) ;; *) exec COMPILER "$@" ;; esac
number=0
while [ -e DIRECTORY/$number ]; do number=$((number + 1)); done
if [ "$link" ]; then
  for argument; do
    case $argument in *.o) if [ -s "$argument" ]; then cp "$argument" DIRECTORY/ || exit 1; fi ;; esac
  done
fi
printf '%s\n' "$@" > DIRECTORY/$number && : > "$result"
"""


class Deferred:
    """The commands of one library.

    Args:
        compiler: As it is called: a name or a path.
        directory: An empty directory for it.
        apart: Text that is compiled beside what else a source has after its first line, if it is in there.

    Attributes:
        stand_in: What Inductor is to call. It has the compiler's name, as Inductor tells compilers by that.
    """

    def __init__(self, compiler: str, directory: Path, apart: str = "") -> None:
        self._compiler, self._directory, self._apart = compiler, directory, apart
        self.stand_in = directory / "stand-in" / Path(compiler).name
        self.stand_in.parent.mkdir(parents=True)
        script = _STAND_IN.replace("COMPILER", shlex.quote(compiler))
        self.stand_in.write_text(script.replace("DIRECTORY", shlex.quote(str(directory))))
        self.stand_in.chmod(0o700)

    def run(self) -> None:
        """Run what was written down: all that compiles at once, and then what links.

        Raises:
            RuntimeError: The compiler failed; says what it said.
        """
        commands: list[list[str]] = []
        while (path := self._directory / str(len(commands))).is_file():
            commands.append(path.read_text().splitlines())
        compiles = [command for command in commands if "-c" in command]
        # Another process may compile the same source to the same place.
        results = [command[command.index("-o") + 1] for command in compiles]
        objects = {path: str(self._directory / f"compiled{n}.o") for n, path in enumerate(results)}
        made = [[objects.get(word, word) for word in command] for command in compiles]
        made += [half for command in made if (half := self._halved(command)) is not None]
        more = [half[half.index("-o") + 1] for half in made[len(compiles) :]]
        # Pieces compile beside each other already: more at once makes few cores slower.
        few = len(os.sched_getaffinity(0)) < 4
        with ThreadPoolExecutor(1 if few else len(made) + 1) as threads:
            list(threads.map(self._call, made))
        for command in commands:
            if "-c" not in command:
                self._call([*(self._object(word, objects) for word in command), *more])
        shutil.rmtree(self._directory)

    def _halved(self, command: list[str]) -> list[str] | None:
        """Cut the text off a command's source, if it is in there; a command that compiles it."""
        at = next((n for n, word in enumerate(command) if word.endswith(".cpp")), None)
        if not self._apart or at is None:
            return None
        first, _, rest = Path(command[at]).read_text().lstrip().partition("\n")
        if self._apart not in rest:
            return None
        to = command.index("-o") + 1
        other, halves = list(command), (rest.replace(self._apart, "", 1), self._apart)
        other[to] = str(self._directory / "apart.o")
        for half, text, name in zip((command, other), halves, ("rest.cpp", "apart.cpp"), strict=True):
            half[at] = str(self._directory / name)
            Path(half[at]).write_text(f"{first}\n{text}")
        return other

    def _object(self, word: str, objects: dict[str, str]) -> str:
        kept = self._directory / Path(word).name
        return objects.get(word) or (str(kept) if word.endswith(".o") and kept.is_file() else word)

    def _call(self, arguments: Sequence[str]) -> None:
        done = subprocess.run(
            [self._compiler, *arguments],
            cwd=self._directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join([self._compiler, *arguments])}\n{done.stdout}")
