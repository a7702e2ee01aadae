"""Compare the image's bill of materials with what is pinned: ``bill.py BILL.spdx.json REQUIREMENTS.txt``.

Every Python package in the image is Palisade or pinned, in the pinned version, and every pinned package is in the image.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

PIN = re.compile(r"^([a-z0-9._-]+)==([^ ;]+)( ;)?", re.MULTILINE)


def python_packages(bill: Path) -> set[tuple[str, str]]:
    """Return name and version of every Python package that an SPDX file lists."""
    found = set()
    for package in json.loads(bill.read_text())["packages"]:
        urls = [reference["referenceLocator"] for reference in package.get("externalRefs", [])]
        if any(url.startswith("pkg:pypi/") for url in urls):
            found.add((re.sub(r"[-_.]+", "-", package["name"]).lower(), package["versionInfo"]))
    return found


def main(bill: Path, requirements: Path) -> int:
    """Print every difference; return the exit status."""
    listed = python_packages(bill)
    pins = PIN.findall(requirements.read_text())
    pinned = {(name, version) for name, version, _ in pins}
    always = {(name, version) for name, version, conditional in pins if not conditional}
    differences = [
        f"{name} {version} is in the image and not pinned" for name, version in listed - pinned if name != "palisade"
    ]
    differences += [f"{name} {version} is pinned and not in the image" for name, version in always - listed]
    if "palisade" not in {name for name, _ in listed}:
        differences.append("palisade itself is not in the image")
    for difference in sorted(differences):
        print(f"{bill}: {difference}")
    if not differences:
        print(f"{bill}: {len(listed)} Python packages, all as {requirements} pins them")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
