"""Draws a dataset in COCO's format: yellow triangles, blue squares, red stars and green discs on noise.

python tests/tools/draw_shapes.py DATA
"""

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HEIGHT, WIDTH = 144, 192
SHAPES = {  # name, number of corners, colour
    1: ("triangle", 3, (220, 190, 60)),
    2: ("square", 4, (70, 110, 220)),
    3: ("star", 10, (210, 70, 60)),
    4: ("disc", 40, (80, 180, 90)),
}


def draw(data: Path, train: int, val: int) -> None:
    """Writes the folder `data`, which must not exist: so many images for training and for validation."""
    (data / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        (data / split).mkdir()
        content = {"images": [], "annotations": [], "info": {}}
        content["categories"] = [{"id": id, "name": name} for id, (name, *_) in SHAPES.items()]
        for index in range(count):
            picture = Image.effect_noise((WIDTH, HEIGHT), 30).convert("RGB")
            for place in random.sample([(48, 36), (144, 36), (48, 108), (144, 108)], k=random.randint(1, 4)):
                entry = {"id": len(content["annotations"]) + 1, "image_id": index, "iscrowd": 0}
                content["annotations"].append(entry | shape(picture, place))
            picture.save(data / split / f"{index}.jpg")
            content["images"].append({"id": index, "file_name": f"{index}.jpg", "width": WIDTH, "height": HEIGHT})
        (data / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def shape(picture: Image.Image, place: tuple[int, int]) -> dict:
    """Draws one shape near a place of the picture; returns its part of an annotation."""
    category, (name, corners, colour) = random.choice(list(SHAPES.items()))
    radius, turn = random.uniform(14, 30), random.uniform(0, math.tau)
    angles = turn + np.linspace(0, math.tau, corners, endpoint=False)
    radii = np.where((np.arange(corners) % 2 == 1) & (name == "star"), radius / 2, radius)
    x, y = (
        centre + random.uniform(-6, 6) + radii * f(angles) for centre, f in zip(place, (np.cos, np.sin), strict=True)
    )
    outline = np.stack([x, y], 1).flatten().tolist()
    ImageDraw.Draw(picture).polygon(outline, fill=tuple(c + random.randint(-50, 30) for c in colour))
    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
    box = [x.min(), y.min(), np.ptp(x), np.ptp(y)]
    return {"category_id": category, "segmentation": [outline], "bbox": box, "area": area}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="a folder, made anew")
    parser.add_argument("--train", type=int, default=400, help="images (default: %(default)s)")
    parser.add_argument("--val", type=int, default=80, help="images (default: %(default)s)")
    draw(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
