"""The embedded data set: small birds on cluttered grounds, drawn, not stored.

An image is a pure function of (seed, split, index). Five families differ in shape and hue; the four
species of a family only in small parts: a wing bar, an eye ring, a crown, or none of these. Such a
part is a light band beside a dark one, which together have the mean colour of the plain bird: the
sum of an image's colours does not give the species away. Pose, scale, place, lighting and ground
are nuisance. The program knows which pixels it draws as bird, so a mask can be evaluated
(`Birds.regions`).
"""

import colorsys
import math
import random
from functools import lru_cache

from PIL import Image, ImageDraw, ImageEnhance
from torch.utils.data import Dataset

CANVAS = 64  # pixels per side of an image
SHARP = 3  # drawn so many times larger, then reduced: smooth edges
GROUND, BIRD, PART = 0, 1, 2  # values of the region map
PARTS = ("ground", "body", "head", "wing")  # of the part map; tail and legs are body
BODY, HEAD, WING, MARK = 1, 2, 3, 4  # drawn: a part, plus MARK where species differ
SPECIES = ("plain", "wing bar", "eye ring", "crown")

# In units of about half a body's length, x forward and y up. body: half-axes; head: centre and
# radius; neck: half its width; bill: length and half its width; tail: length, half its width, rise.
FAMILIES = {
    "finch": dict(hue=0.02, body=(1.0, 0.72), head=(0.78, 0.62, 0.52), neck=0.5,
                  bill=(0.45, 0.20), tail=(0.75, 0.22, -0.05), legs=0.35),
    "duck": dict(hue=0.30, body=(1.15, 0.50), head=(1.05, 0.72, 0.48), neck=0.26,
                 bill=(0.60, 0.14), tail=(0.35, 0.24, 0.35), legs=0.0),
    "heron": dict(hue=0.58, body=(0.95, 0.42), head=(1.05, 1.35, 0.48), neck=0.15,
                  bill=(0.85, 0.10), tail=(0.35, 0.16, -0.25), legs=1.05),
    "magpie": dict(hue=0.80, body=(0.85, 0.50), head=(0.72, 0.48, 0.48), neck=0.34,
                   bill=(0.45, 0.14), tail=(1.55, 0.16, 0.15), legs=0.45),
    "owl": dict(hue=0.12, body=(0.72, 0.92), head=(0.18, 0.98, 0.66), neck=0.58,
                bill=(0.25, 0.18), tail=(0.40, 0.26, -0.75), legs=0.18),
}
CLASSES = tuple(f"{family}, {species}" for family in FAMILIES for species in SPECIES)


def rgb(hue, saturation, value):
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def ellipse(x, y, rx, ry, start=0.0, end=2 * math.pi, points=20):
    """Points of an ellipse, or of the piece of it between two angles (closed by a chord)."""
    angles = (start + (end - start) * i / points for i in range(points + 1))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


class Easel:
    """An image and the map of its parts, drawn together in one pose."""

    def __init__(self, size):
        self.image = Image.new("RGB", (size, size))
        self.map = Image.new("L", (size, size))
        self.brushes = ImageDraw.Draw(self.image), ImageDraw.Draw(self.map)
        self.pose(size / 2, size / 2, 1.0, 0.0, False)

    def pose(self, x, y, scale, tilt, mirrored):
        self.x, self.y, self.scale, self.mirrored = x, y, scale, mirrored
        self.cos, self.sin = math.cos(tilt), math.sin(tilt)

    def place(self, point):
        """Body coordinates to pixels."""
        px, py = point
        rx, ry = px * self.cos - py * self.sin, px * self.sin + py * self.cos
        return self.x + (-rx if self.mirrored else rx) * self.scale, self.y - ry * self.scale

    def paint(self, outline, colour, part):
        outline = [self.place(point) for point in outline]
        self.brushes[0].polygon(outline, fill=colour)
        self.brushes[1].polygon(outline, fill=part)


def draw_ground(easel, rng):
    """Greyish sky over greyish land, then many small stones, leaves and twigs of every hue.

    Small and many, so that the ground does not identify the image of a crop.
    """
    size, pen = easel.image.width, easel.brushes[0]
    horizon = rng.uniform(0.2, 0.9) * size
    sky = rgb(rng.random(), rng.uniform(0, 0.15), rng.uniform(0.55, 0.8))
    land = rgb(rng.random(), rng.uniform(0, 0.2), rng.uniform(0.35, 0.65))
    pen.rectangle((0, 0, size, horizon), sky)
    pen.rectangle((0, horizon, size, size), land)
    for _ in range(rng.randint(160, 220)):
        colour = rgb(rng.random(), rng.random(), rng.uniform(0.15, 1.0))
        x, y, r = rng.uniform(0, size), rng.uniform(0, size), size * rng.uniform(0.012, 0.05)
        turn = rng.uniform(0, math.pi)
        if rng.random() < 0.4:
            length = r * rng.uniform(2, 5)
            dx, dy = length * math.cos(turn), length * math.sin(turn)
            pen.line((x - dx, y - dy, x + dx, y + dy), colour, width=rng.randint(1, 2) * SHARP)
        else:
            corners = rng.randint(3, 7)
            angles = (turn + 2 * math.pi * i / corners for i in range(corners))
            pen.polygon([(x + r * rng.uniform(0.5, 1.3) * math.cos(angle),
                          y + r * rng.uniform(0.5, 1.3) * math.sin(angle)) for angle in angles],
                        colour)


def draw_bird(easel, family, species, rng):
    """One bird in the easel's pose. The places where species differ have MARK on every bird."""
    shape = FAMILIES[family]
    hue = shape["hue"] + rng.gauss(0, 0.02)
    saturation, value = rng.uniform(0.75, 0.85), rng.uniform(0.48, 0.54)
    coat, wing = rgb(hue, saturation, value), rgb(hue, saturation, value * 0.62)
    horn = rgb(0.1, 0.5, 0.35)
    (bx, by), (hx, hy, hr) = shape["body"], shape["head"]
    hx, hy = hx + rng.gauss(0, 0.04), hy + rng.gauss(0, 0.04)

    for foot in (-0.12, 0.16):  # behind the body
        if shape["legs"]:
            step, low = foot + rng.gauss(0, 0.08), -by - shape["legs"]
            easel.paint([(foot - 0.04, -by * 0.8), (foot + 0.04, -by * 0.8), (step + 0.04, low),
                         (step + 0.16, low - 0.05), (step - 0.04, low - 0.05)], horn, BODY)
    length, width, rise = shape["tail"]
    easel.paint([(-bx * 0.7, width), (-bx * 0.7, -width), (-bx - length, rise - width * 0.8),
                 (-bx - length * 0.95, rise + width * 0.5)], wing, BODY)
    easel.paint(ellipse(0, 0, bx, by), coat, BODY)
    neck, root = shape["neck"], (bx * 0.62, by * 0.25)
    easel.paint([(root[0] - neck, root[1]), (root[0] + neck * 0.6, root[1] - neck * 0.5),
                 (hx + neck * 0.8, hy), (hx - neck * 0.8, hy)], coat, BODY)
    easel.paint(ellipse(hx, hy, hr, hr), coat, HEAD)
    fold = rng.gauss(0, 0.08)
    easel.paint(ellipse(-0.22 * bx, 0.08 + fold, bx * 0.62, by * 0.52), wing, WING)

    # the parts: in two bands on the species that has them, plain on the others
    def bands(part, brightness):
        contrast = 0.9 if part == species else 0
        return [rgb(hue, saturation, brightness * (1 + sign * contrast)) for sign in (1, -1)]

    light, dark = bands("wing bar", value * 0.62)
    for x, y, colour in ((0, 0, light), (-0.18 * bx, -0.06 * by, dark)):
        easel.paint([(x - 0.66 * bx, y + fold + 0.36 * by), (x - 0.22 * bx, y + fold + 0.50 * by),
                     (x + 0.22 * bx, y + fold - 0.24 * by), (x - 0.20 * bx, y + fold - 0.34 * by)],
                    colour, WING + MARK)
    light, dark = bands("crown", value)
    for width, height, colour in ((1.1, 1.45, dark), (0.9, 0.9, light)):
        easel.paint(ellipse(hx, hy + 0.1 * hr, width * hr, height * hr, 0, math.pi), colour,
                    HEAD + MARK)
    light, dark = bands("eye ring", value)
    for radius, colour in ((0.66, dark), (0.5, light), (0.22, (20, 20, 24))):
        easel.paint(ellipse(hx + 0.2 * hr, hy, radius * hr, radius * hr), colour,
                    HEAD + MARK)

    bill, thick = shape["bill"]
    root = hx + 0.9 * hr
    easel.paint([(root, hy + thick), (root + bill, hy - 0.05), (root, hy - thick)], horn, HEAD)


@lru_cache(maxsize=None)
def draw(seed, split, index):
    """Draw one image, class index % len(CLASSES) -> (RGB image, "L" map of its parts and MARK)."""
    rng = random.Random(f"{seed}/{split}/{index}")  # of a string: the same on every platform
    family, species = CLASSES[index % len(CLASSES)].split(", ")
    size = CANVAS * SHARP
    easel = Easel(size)
    draw_ground(easel, rng)
    must_show = (0, 0), FAMILIES[family]["head"][:2]  # a bird whose parts are outside has no class
    while True:
        easel.pose(size * rng.uniform(0.15, 0.85), size * rng.uniform(0.15, 0.85),
                   size * rng.uniform(0.24, 0.36), rng.gauss(0, 0.3), rng.random() < 0.5)
        if all(0.15 * size < v < 0.85 * size for point in must_show for v in easel.place(point)):
            break
    draw_bird(easel, family, species, rng)
    image = easel.image.reduce(SHARP)
    for light in (ImageEnhance.Brightness, ImageEnhance.Contrast):
        image = light(image).enhance(rng.uniform(0.75, 1.2))
    return image, easel.map.resize((CANVAS, CANVAS), Image.Resampling.NEAREST)


class Birds(Dataset):
    """(RGB image, class) pairs like torchvision's image folders, plus the true regions and parts.

    split "train" or "test"; seed gives another draw of the same classes. Images are drawn on
    first access and cached (12 KB each)."""

    classes, parts = list(CLASSES), PARTS

    def __init__(self, split, size, seed=0):
        self.split, self.seed = split, seed
        self.targets = [index % len(CLASSES) for index in range(size)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return draw(self.seed, self.split, index)[0], self.targets[index]

    def regions(self, index):
        """Return the region map of an image: an "L" image of GROUND, BIRD and PART."""
        drawn = draw(self.seed, self.split, index)[1]
        return drawn.point([GROUND] + [BIRD] * MARK + [PART] * (255 - MARK))

    def part_map(self, index):
        """Return the part map of an image: an "L" image of indices in PARTS."""
        return draw(self.seed, self.split, index)[1].point([v % MARK for v in range(256)])
