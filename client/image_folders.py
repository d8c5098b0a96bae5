"""A folder of image files as a table: [site/]class/file, one row a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from privacy.errors import DataError
from strategies.job_data import Data

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def image_table(folder: Path, data: Data) -> pd.DataFrame:
    """Read every image below `folder`, scaled to the shape that the job declares; the folder above a file is its class,
    and the one above that its site, where `data.client` names such a column.

    Rows are in the order of their paths. Raises `DataError`; names of files may be those of persons, and are not said.
    """
    try:
        from PIL import Image
    except ImportError:
        raise DataError(f"{folder}: folders of images need the extra: pip install fedchorus[llm]") from None
    ((name, column),) = data.columns.items()
    side, _, colours = [*(column.shape or []), 1][:3]
    above = [data.target] if data.client is None else [data.client, data.target]
    pattern = "/".join(["*"] * (len(above) + 1))
    paths = sorted(path for path in folder.glob(pattern) if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        levels = "/".join(["SITE"] * (data.client is not None) + ["CLASS", "FILE"])
        raise DataError(f"{folder}: no images; the job reads {levels} with FILE one of *{', *'.join(SUFFIXES)}")
    cells, wrong, deep = [], 0, 0
    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode[:1] in ("I", "F"):  # Pillow would cut what is above 255.
                    deep += 1
                    continue
                scaled = image.convert("RGB" if colours == 3 else "L").resize((side, side), Image.Resampling.BILINEAR)
                cells.append(np.asarray(scaled, dtype=np.uint8))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            wrong += 1
    if wrong:
        raise DataError(f"{folder}: {wrong} of {len(paths)} files are no images that can be read")
    if deep:
        raise DataError(f"{folder}: {deep} of {len(paths)} images have more than 8 bits a channel; convert them first")
    folders = [path.relative_to(folder).parts[: len(above)] for path in paths]
    return pd.DataFrame({name: cells} | {key: [own[at] for own in folders] for at, key in enumerate(above)})
