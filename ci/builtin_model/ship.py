"""Put a finished training run into the package.

    python ci/builtin_model/ship.py --run DIR --corpus DIR

Copies the FP8 model, the held-out text and the list of sources into model/pretrained/, where the
model card stays as it is: its figures are for a person to measure and write.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parents[2] / "model" / "pretrained"
LARGEST = 25_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of `dsa-hal train --out`")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of corpus.py --out")
    args = parser.parse_args()
    model = args.run / "model-fp8"
    files = [*sorted(model.glob("*")), args.corpus / "heldout.jsonl", args.corpus / "sources.csv"]
    if missing := [str(f) for f in (model / "model.safetensors", *files) if not f.is_file()]:
        print(f"ship.py: {missing[0]} does not exist; finish the run and the corpus first",
              file=sys.stderr)  # fmt: skip
        return 2
    size = (model / "model.safetensors").stat().st_size
    if size > LARGEST:
        print(f"ship.py: the weights are {size} bytes; at most {LARGEST} ship", file=sys.stderr)
        return 2
    for file in files:
        partial = TARGET / f".{file.name}.partial"
        shutil.copyfile(file, partial)
        os.replace(partial, TARGET / file.name)
    print(f"{len(files)} files, {size / 1e6:.1f} MB of weights, in {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
