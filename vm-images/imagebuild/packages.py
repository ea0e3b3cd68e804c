"""Debian packages: downloading, taking apart, and finding what their programs and modules need.

Packages come through apt, which verifies their signatures; none is installed on this machine.
"""

from __future__ import annotations

import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "BuildError",
    "Programs",
    "download",
    "extract",
    "kernel_package",
    "library_packages",
    "log",
    "mirrors",
    "modules_with_dependencies",
    "run",
]


class BuildError(Exception):
    """An image cannot be built; the message says what to do."""


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Runs a command without input; returns its output, or raises with the end of it."""
    words = [str(word) for word in command]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise BuildError(f"{words[0]} is not installed: run scripts/install-deps") from error
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise BuildError(f"'{' '.join(words)}' ended with {done.returncode}:\n{tail}")
    return done.stdout


def mirrors() -> dict[str, str]:
    """Where this machine's apt takes each release from, as its sources say."""
    targets = run(
        "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"
    )
    found: dict[str, str] = {}
    for line in targets.splitlines():
        uri, _, release = line.partition(" ")
        found.setdefault(release, uri)
    return found


def depends(packages: Iterable[str]) -> list[str]:
    """Names that any of the packages depends on (of alternatives, the first)."""
    names = []
    alternative = False
    for line in run("apt-cache", "depends", "--important", *packages).splitlines():
        text = line.strip()
        kind, _, name = text.lstrip("|").partition(": ")
        if kind in ("Depends", "PreDepends") and not alternative and not name.startswith("<"):
            names.append(name.removesuffix(":any"))
        alternative = text.startswith("|")
    return names


def kernel_package() -> str:
    """The package that holds the kernel `linux-image-cloud-amd64` stands for today."""
    for name in depends(["linux-image-cloud-amd64"]):
        if name.startswith("linux-image-"):
            return name
    raise BuildError("apt knows no linux-image-cloud-amd64: run 'apt-get update', on Debian amd64")


def library_packages(roots: Iterable[str]) -> list[str]:
    """The packages named and every library package they need, directly or not."""
    found: list[str] = []
    level = list(roots)
    while level:
        found += level
        wanted = {name for name in depends(level) if name.startswith("lib")}
        level = sorted(wanted - set(found))
    return found


def download(packages: Iterable[str], directory: Path) -> list[Path]:
    """Downloads packages as apt would install them; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    # As root, apt wants to download as its own user, who may not write here.
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", *packages]
    try:
        run(*command, cwd=directory)
    except BuildError:
        # Lists of an earlier day name packages that mirrors no longer have.
        if os.geteuid() != 0:
            raise
        run("apt-get", "-o", "Acquire::Retries=3", "update")
        run(*command, cwd=directory)
    return sorted(directory.glob("*.deb"))


def extract(packages: Iterable[Path], root: Path) -> None:
    """Unpacks packages below `root`, which becomes a merged-/usr tree."""
    root.mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    for package in packages:
        # Through tar, as dpkg -x would replace the links by directories.
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
        ) as source:
            unpacked = subprocess.run(
                ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(root)],
                stdin=source.stdout,
                check=False,
            )
        if source.returncode or unpacked.returncode:
            raise BuildError(f"{package.name} cannot be unpacked: remove it and try again")


class Programs:
    """Copies programs from an unpacked tree into a file tree, with the libraries they need."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source = source
        self.target = target
        self.copied: set[str] = set()
        self.libraries = {
            path.name: path
            for folder in ("usr/lib/x86_64-linux-gnu", "usr/lib64")
            for path in (source / folder).glob("*.so*")
        }

    def add(self, name: str) -> None:
        """Adds the program of that name (in bin or sbin) to the target's /sbin."""
        for folder in ("usr/sbin", "usr/bin"):
            path = self.source / folder / name
            if path.exists():
                self._copy(path, self.target / "sbin" / name)
                return
        raise BuildError(f"no program {name} in the packages under {self.source}")

    def _copy(self, source: Path, target: Path) -> None:
        if str(target) in self.copied:
            return
        self.copied.add(str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755)
        if source.read_bytes()[:4] != b"\x7fELF":
            return
        for line in run("readelf", "-d", "-l", source).splitlines():
            if "(NEEDED)" in line:
                library = line.split("[", 1)[1].rstrip("]")
                place = self.target / "lib" / library
            elif "Requesting program interpreter" in line:
                interpreter = line.split(": ", 1)[1].rstrip("]")
                library = Path(interpreter).name
                place = self.target / interpreter.lstrip("/")
            else:
                continue
            if library not in self.libraries:
                raise BuildError(f"{source.name} needs {library}, which no unpacked package has")
            self._copy(self.libraries[library], place)


def modules_with_dependencies(module_root: Path, wanted: Iterable[str]) -> list[tuple[str, bytes]]:
    """Kernel modules and what they depend on, as (file name, contents), in the order to load them.

    module_root: lib/modules/VERSION of an unpacked kernel package. Modules that are built into the
    kernel are left out; a module that is nowhere raises.
    """
    files = {path.name.split(".")[0].replace("-", "_"): path for path in module_root.rglob("*.ko*")}
    builtin = {
        Path(line).name.split(".")[0].replace("-", "_")
        for line in (module_root / "modules.builtin").read_text().splitlines()
    }
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name in builtin:
            return
        if name not in files:
            raise BuildError(f"the kernel in {module_root.name} has no module {name}")
        contents = files[name].read_bytes()
        if files[name].suffix == ".xz":
            contents = lzma.decompress(contents)
        # .modinfo is a run of NUL-terminated key=value strings.
        for part in contents.split(b"\0depends=")[1:2]:
            for dependency in part.split(b"\0", 1)[0].decode().split(","):
                if dependency:
                    add(dependency.replace("-", "_"))
        # libcrc32c and others find their algorithm by name at run time (softdep), not by symbol.
        for part in contents.split(b"\0softdep=pre: ")[1:]:
            for dependency in part.split(b"\0", 1)[0].decode().split():
                if dependency.replace("-", "_") in files:
                    add(dependency.replace("-", "_"))
        ordered[name] = contents

    for name in wanted:
        add(name)
    return [(f"{name}.ko", contents) for name, contents in ordered.items()]


def log(message: str) -> None:
    """Progress, to where it does not mix with the paths that are the output."""
    print(f"vm-images: {message}", file=sys.stderr, flush=True)
