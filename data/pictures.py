"""Picture files as they come: upright, RGB, and an error that names the file."""

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from lodisc import first_line


def open_picture(path):
    """RGB image of a file, turned as its EXIF note says, 16-bit grey scaled to 8 bits.

    Raises ValueError, one line with the path, for what is no picture or half of one.
    """
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # Pillow's own conversion clips 16 bits at 255
                levels = np.asarray(picture).astype(np.uint32) >> 8
                picture = Image.fromarray(levels.astype(np.uint8))
            if "transparency" in picture.info:
                picture = picture.convert("RGBA")
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {first_line(error)}; mend it, or "
                         "take it out of the data") from None


class Pictures(Dataset):
    """(RGB image, class) of a list of paths."""

    def __init__(self, paths, targets, classes):
        self.paths, self.targets, self.classes = paths, targets, classes

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return open_picture(self.paths[index]), self.targets[index]
