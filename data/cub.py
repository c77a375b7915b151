"""CUB-200-2011 (Wah, Branson, Welinder, Perona, Belongie 2011), read from its official archive.

    ROOT/CUB_200_2011/images.txt, image_class_labels.txt, train_test_split.txt, bounding_boxes.txt,
                      classes.txt and images/<class>/<picture>.jpg
    ROOT/segmentations/<class>/<picture>.png    or inside CUB_200_2011; an archive of its own

torchvision has a class for every other data set of the paper, but none for this one.
"""

from pathlib import Path

from PIL import Image, ImageDraw
from torchvision.datasets.utils import download_and_extract_archive

from data.birds import BIRD, GROUND
from data.pictures import Pictures, open_picture

URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
MD5 = "97eceeb196236b17998738112f37df78"


def read_columns(path):
    """Lines of "<id> <rest>" -> {id: rest}."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.strip().split(maxsplit=1) for line in lines if line.strip())


class CUB(Pictures):
    """(RGB image, class) of the official split: 5,994 to train on, 5,794 to test on, 200 species.

    regions(index) says where the bird is: by its segmentation where that archive was unpacked
    too, else by its bounding box.
    """

    def __init__(self, root, split, download=False):
        root = Path(root)
        folder = root / "CUB_200_2011"
        if download and not (folder / "images.txt").is_file():
            download_and_extract_archive(URL, root, md5=MD5)
        names, labels, in_train, boxes = (
            read_columns(folder / f"{name}.txt") for name in
            ("images", "image_class_labels", "train_test_split", "bounding_boxes"))
        ids = [i for i in names if (in_train[i] == "1") == (split == "train")]
        super().__init__([folder / "images" / names[i] for i in ids],
                         [int(labels[i]) - 1 for i in ids],
                         list(read_columns(folder / "classes.txt").values()))
        self.boxes = [[float(number) for number in boxes[i].split()] for i in ids]
        drawn = [place / "segmentations" for place in (root, folder)]
        drawn = next((place for place in drawn if place.is_dir()), None)
        self.drawn = drawn and [(drawn / names[i]).with_suffix(".png") for i in ids]

    def regions(self, index):
        """Region map as of the drawn birds, as large as the picture: BIRD or GROUND."""
        if self.drawn:  # grey levels: how many of the five annotators said bird
            said = Image.open(self.drawn[index]).convert("L")
            return said.point([GROUND] * 128 + [BIRD] * 128)
        regions = Image.new("L", open_picture(self.paths[index]).size, GROUND)
        x, y, width, height = self.boxes[index]  # in pixels, from the upper left corner
        ImageDraw.Draw(regions).rectangle((x, y, x + width - 1, y + height - 1), BIRD)
        return regions
