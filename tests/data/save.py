"""Save configs and processors of the published models with releases of transformers, as test data.

    for version in 4.49.0 4.50.0 4.52.4 4.53.3 4.54.1 4.56.2 4.57.6 5.0.0 5.4.0 5.6.2 5.16.1 5.23.0; do
        pip install --no-deps --target releases/$version transformers==$version
    done
    python tests/data/save.py releases

A release may need others of its time beside it in its directory, as huggingface_hub below 1, httpx or
torchvision. Writes one JSON file for each: config.json of a 3B, a 7B and an untied 3B, and what a processor
saves. Others write the same as the one before them in this list (4.51.3, 4.55.4, 5.1.0, 5.2.0, 5.3.0, 5.5.4,
5.7.0, 5.8.1, 5.12.1) or after it (5.20.2, 5.21.1, 5.22.2).
"""

import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

HERE = Path(__file__).parent
TINY = HERE.parent.parent / "tiny"


def save(directory: Path) -> dict:
    """What the release of transformers on the path writes, from the config.json files in a directory."""
    # Configs and processors run beside any version of the other packages.
    for name in ("transformers.dependency_versions_check", "torchvision._meta_registrations"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].dep_version_check = lambda *args: None
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor

    saved = {}
    for size in ("3B", "7B", "untied 3B"):
        config = Qwen2_5_VLConfig.from_pretrained(directory / size.split()[-1])
        if "untied" in size:
            config.tie_word_embeddings = False
        config.save_pretrained(directory / "out")
        saved[size] = json.loads((directory / "out" / "config.json").read_text())

    # Without the tokenizer's files, but with its template.
    Qwen2_5_VLProcessor.from_pretrained(TINY).save_pretrained(directory / "processor")
    saved["processor"] = {}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
                 "chat_template.json", "chat_template.jinja"):
        file = directory / "processor" / name
        if file.exists():
            saved["processor"][name] = file.read_text()
    return saved


def main(releases: Path) -> None:
    sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent), str(HERE.parent.parent / "tools")]
    from conftest import flat, write

    before = None
    for release in sorted(releases.iterdir(), key=lambda directory: [*map(int, directory.name.split("."))]):
        with tempfile.TemporaryDirectory() as temporary:
            for size in ("3B", "7B"):
                (Path(temporary) / size).mkdir()
                write(Path(temporary) / size, flat(size))
            environment = os.environ | dict(PYTHONPATH=str(release))
            content = subprocess.run(
                [sys.executable, __file__, "--here", temporary], env=environment, check=True,
                stdout=subprocess.PIPE).stdout

        # Most releases write what the one before them has written.
        form = content.replace(release.name.encode(), b"")
        if form != before:
            (HERE / f"{release.name}.json").write_bytes(content)
        before = form


if __name__ == "__main__":
    if sys.argv[1] == "--here":
        print(json.dumps(save(Path(sys.argv[2]))))
    else:
        main(Path(sys.argv[1]))
