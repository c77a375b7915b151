"""Arrange Oxford 17 Category Flower (Nilsback and Zisserman 2006) as an ImageFolder.

    python data/flowers17.py JPG_FOLDER OUT

JPG_FOLDER: the archive's jpg/, image_0001.jpg to image_1360.jpg, 80 a class in this order. OUT: a
new folder; it gets train/c1 ... c17 (1,088 pictures) and test/ (272, 16 a class, those listed in
flowers17_test.txt), the short side 160 px, which is enough for training at 64 to 128 px.
"""

import sys
from pathlib import Path

from PIL import Image


def main(source, out):
    source, out = Path(source), Path(out)
    if out.exists():
        sys.exit(f"{out} exists; name a new folder")
    pictures = sorted(source.glob("image_*.jpg"))
    if len(pictures) != 1360:
        sys.exit(f"expected image_0001.jpg to image_1360.jpg in {source}, found {len(pictures)}")
    test = set(map(int, Path(__file__).with_name("flowers17_test.txt").read_text().split()))
    for number, path in enumerate(pictures, start=1):
        folder = out / ("test" if number in test else "train") / f"c{(number - 1) // 80 + 1}"
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            scale = 160 / min(image.size)
            size = tuple(max(160, round(side * scale)) for side in image.size)
            image.convert("RGB").resize(size, Image.LANCZOS).save(folder / path.name, quality=90)
    print(f"{len(pictures) - len(test)} training and {len(test)} test pictures in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
