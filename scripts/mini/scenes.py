"""A small world: table-top scenes with exact depth, object masks and captions, rendered by ray casting in torch.

A scene is a camera, some objects on a floor before a wall, materials, colours and light. Every number of it comes from
one seed, and its geometry is apart from its look, so that the same geometry can be rendered again in other colours,
materials and light: then words alone explain the difference.

    python scripts/mini/scenes.py sheet.png        # look at some

Letters: S scenes, K objects of a scene, R rays of a picture, P rays of some objects together. The world is measured in
its own units: an object is about one high; y is up, the floor is y = 0, the camera looks along -z.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Container
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

SIZE = 128
"""Height and width of a picture in pixels."""

SAMPLES = 2
"""Rays a pixel, in height and in width."""

MAX_OBJECTS = 4
FAR = 1e6
SHAPES = ("sphere", "cube", "cylinder", "cone", "torus")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, 0.07, 0.07),
    "orange": (0.95, 0.42, 0.04),
    "yellow": (0.93, 0.80, 0.10),
    "green": (0.10, 0.58, 0.14),
    "cyan": (0.12, 0.72, 0.75),
    "blue": (0.10, 0.18, 0.82),
    "purple": (0.48, 0.12, 0.66),
    "white": (0.92, 0.92, 0.92),
    "black": (0.06, 0.06, 0.07),
}
MATERIALS = ("plain", "metal", "striped", "chequered", "wooden", "marble")
FLOORS: dict[str, tuple[float, float, float]] = {
    "wooden": (0.55, 0.36, 0.20),
    "white": (0.85, 0.85, 0.83),
    "grey": (0.45, 0.45, 0.47),
    "green": (0.28, 0.50, 0.22),
    "sandy": (0.80, 0.68, 0.45),
    "chequered": (0.80, 0.80, 0.80),
}
WALLS: dict[str, tuple[float, float, float]] = {
    "white": (0.85, 0.85, 0.85),
    "grey": (0.50, 0.51, 0.53),
    "blue": (0.35, 0.50, 0.78),
    "pink": (0.86, 0.60, 0.62),
    "yellow": (0.88, 0.78, 0.48),
    "dark": (0.14, 0.14, 0.17),
}


@dataclass(frozen=True)
class Light:
    """Colour and place of a lamp, and of the light that comes from everywhere."""

    lamp: tuple[float, float, float]
    ambient: tuple[float, float, float]
    height: float


LIGHTS: dict[str, Light] = {
    "day": Light((0.80, 0.78, 0.74), (0.36, 0.38, 0.42), 5.0),
    "sunset": Light((0.98, 0.62, 0.38), (0.32, 0.24, 0.27), 2.6),
    "night": Light((0.26, 0.32, 0.55), (0.09, 0.11, 0.20), 4.5),
    "studio": Light((0.66, 0.66, 0.66), (0.48, 0.48, 0.48), 6.0),
}


@dataclass(frozen=True)
class Body:
    """One object's geometry: shape, place on the floor, half width, height and turn about the vertical axis."""

    shape: str
    x: float
    z: float
    radius: float
    height: float
    turn: float


@dataclass(frozen=True)
class Skin:
    """One object's look."""

    colour: str
    material: str


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows."""

    bodies: tuple[Body, ...]
    skins: tuple[Skin, ...]
    floor: str
    wall: str
    light: str
    lamp_side: float
    camera: tuple[float, float, float]
    look_at: tuple[float, float, float]
    wall_z: float
    pattern: float


@dataclass
class Rendered:
    """Pictures of S scenes.

    Attributes:
        image: (S, 3, SIZE, SIZE), float, 0..1.
        disparity: (S, SIZE, SIZE), float, 1 / distance along the camera's axis; near is large.
        mask: (S, SIZE, SIZE), int64, 0 for floor and wall, k + 1 for object k; that of most of a pixel's rays.
        empty: (S, SIZE, SIZE), float, the disparity of floor and wall without the objects.
    """

    image: Tensor
    disparity: Tensor
    mask: Tensor
    empty: Tensor


def random_scene(seed: int) -> Scene:
    """Make the scene of a seed: 1 to 4 objects that stand on the floor and do not run into each other."""
    rng = random.Random(seed)
    bodies: list[Body] = []
    for _ in range(rng.choice((1, 2, 2, 3, 3, 4))):
        for _attempt in range(40):
            radius = rng.uniform(0.42, 0.72)
            x, z = rng.uniform(-1.35, 1.35), rng.uniform(-1.4, 0.8)
            if all(math.hypot(x - other.x, z - other.z) > 0.95 * (radius + other.radius) for other in bodies):
                unused = [name for name in SHAPES if name not in {body.shape for body in bodies}]
                shape = rng.choice(unused if rng.random() < 0.7 else SHAPES)
                height = {"sphere": 2 * radius, "torus": 0.64 * radius}.get(shape, radius * rng.uniform(1.3, 2.3))
                height = 2 * radius * 0.8 if shape == "cube" else height
                bodies.append(Body(shape, x, z, radius, height, rng.uniform(0, math.pi)))
                break
    camera = (rng.uniform(-0.7, 0.7), rng.uniform(1.5, 2.5), rng.uniform(3.9, 4.6))
    look_at = (rng.uniform(-0.15, 0.15), rng.uniform(0.45, 0.65), 0.0)
    geometry = Scene(tuple(bodies), (), "", "", "", 0.0, camera, look_at, rng.uniform(-3.4, -2.2), 0.0)
    return repaint(geometry, seed)


def repaint(scene: Scene, seed: int) -> Scene:
    """Give the geometry of a scene another look: colours all different, materials, floor, wall and light."""
    rng = random.Random(f"look {seed}")
    colours = rng.sample(sorted(COLOURS), len(scene.bodies))
    skins = tuple(Skin(colour, rng.choice(("plain", "plain", "plain", *MATERIALS[1:]))) for colour in colours)
    return replace(
        scene,
        skins=skins,
        floor=rng.choice(sorted(FLOORS)),
        wall=rng.choice(sorted(WALLS)),
        light=rng.choice(("day", "day", "studio", "sunset", "night")),
        lamp_side=rng.uniform(-3.0, 3.0),
        pattern=rng.uniform(0, 10),
    )


# Captions


def caption(scene: Scene, seed: int, visible: Container[int] | None = None) -> str:
    """Describe a scene in words that vary and leave things out; of its objects, only those that are visible."""
    return worded(scene, seed, visible)[0]


def worded(scene: Scene, seed: int, visible: Container[int] | None = None) -> tuple[str, dict[int, str]]:
    """Describe a scene as `caption` does, and say by which words each object is named: number -> part of the text."""
    rng = random.Random(f"words {seed}")
    seen = [k for k in range(len(scene.bodies)) if visible is None or k in visible]
    parts = [(k, describe(scene, k, seen, rng)) for k in seen]
    if not parts:
        return "an empty room", {}
    rng.shuffle(parts)
    if rng.random() < 0.25:
        parts = parts[: rng.randint(1, len(parts))]
    names = [name for _, name in parts]
    text = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    text = rng.choice(("", "", "", "a photo of ", "a picture of ", "there is ")) + text
    if rng.random() < 0.55:
        text += rng.choice((" on a {} floor", " on a {} table", " on {} ground")).format(scene.floor)
    if rng.random() < 0.35:
        text += rng.choice((" before a {} wall", ", {} background", " in front of a {} wall")).format(scene.wall)
    if rng.random() < 0.6 or scene.light in ("sunset", "night"):  # where nothing is said of it, there is light
        text += rng.choice(LIGHT_WORDS[scene.light])
    if rng.random() < 0.04:
        return rng.choice(LIGHT_WORDS[scene.light]).lstrip(", "), {}
    return text, dict(parts)


LIGHT_WORDS: dict[str, tuple[str, ...]] = {
    "day": (", daylight", " by day", ", in the daytime"),
    "sunset": (" at sunset", ", at sunset", ", in the evening sun"),
    "night": (" at night", ", at night", ", in the moonlight"),
    "studio": (", studio light", " in a studio"),
}
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "sphere": ("sphere", "ball", "sphere"),
    "cube": ("cube", "box", "cube"),
    "cylinder": ("cylinder", "cylinder", "can"),
    "cone": ("cone",),
    "torus": ("torus", "ring", "donut"),
}
MATERIAL_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("", "", "", "plain "),
    "metal": ("metal ", "shiny ", "metallic "),
    "striped": ("striped ",),
    "chequered": ("chequered ", "checkered "),
    "wooden": ("wooden ",),
    "marble": ("marble ",),
}


PLACES = ("on the left", "in the middle", "on the right")


def describe(scene: Scene, k: int, seen: list[int], rng: random.Random, vague: bool = True) -> str:
    """Name one of the objects seen: colour, material, shape, and its place where another has the same shape.

    Args:
        scene: holds the object.
        k: its number.
        seen: numbers of all objects that can be seen.
        rng: chooses the words.
        vague: whether shape and place may be left out too.
    """
    body, skin = scene.bodies[k], scene.skins[k]
    material = rng.choice(MATERIAL_WORDS[skin.material]) if rng.random() < 0.8 else ""
    colour = skin.colour
    if skin.material == "metal" and rng.random() < 0.6:
        gold = {"yellow": "golden", "white": "silver"}.get(colour)
        colour, material = (gold, "") if gold else (colour, material)
    shape = "thing" if vague and rng.random() < 0.05 else rng.choice(SHAPE_WORDS[body.shape])
    article = "an" if colour[0] in "aeiou" else "a"
    text = f"{article} {colour} {material}{shape}"
    place = place_among(scene, k, group_of(scene, k, seen))
    alone = len(alike(scene, k, seen)) == 1
    told = rng.random() < (0.1 if alone else 0.85 if vague else 1.0)
    return f"{text} {place}" if place and told else text


def alike(scene: Scene, k: int, seen: list[int]) -> list[int]:
    """List the objects seen that have an object's shape, itself among them."""
    return [other for other in seen if scene.bodies[other].shape == scene.bodies[k].shape]


def group_of(scene: Scene, k: int, seen: list[int]) -> list[int]:
    """List the objects among which an object's place is told: those of its shape, or all where it is the only one."""
    same = alike(scene, k, seen)
    return same if len(same) > 1 else seen


def place_among(scene: Scene, k: int, group: list[int]) -> str:
    """Say where in the picture an object of a group stands, if the group has two or three."""
    if len(group) not in (2, 3):
        return ""
    order = sorted(group, key=lambda other: across(scene, scene.bodies[other])).index(k)
    return PLACES[order * 2 if len(group) == 2 else order]


def across(scene: Scene, body: Body) -> float:
    """Return how far right of the picture's middle an object appears, as the tangent of the angle."""
    (ex, _, ez), (ax, _, az) = scene.camera, scene.look_at
    forward, dx, dz = math.hypot(ax - ex, az - ez), body.x - ex, body.z - ez
    fx, fz = (ax - ex) / forward, (az - ez) / forward
    return (dz * fx - dx * fz) / (dx * fx + dz * fz)


# Geometry: each function takes rays in an object's own frame (3, P) and returns distance and normal


def hit_sphere(o: Tensor, d: Tensor, radius: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """Meet a ball that stands on the floor."""
    centre = torch.stack([torch.zeros_like(radius), radius, torch.zeros_like(radius)])
    o = o - centre
    b, c = (o * d).sum(0), (o * o).sum(0) - radius**2
    root = b * b - c
    t = torch.where(root > 0, -b - root.clamp(min=0).sqrt(), FAR)
    return t, (o + t * d) / radius


def hit_cube(o: Tensor, d: Tensor, radius: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """Meet an upright box, by slabs."""
    half = torch.stack([radius * 0.8, height / 2, radius * 0.8])
    o = o - torch.stack([torch.zeros_like(height), height / 2, torch.zeros_like(height)])
    safe = torch.where(d.abs() < 1e-8, torch.full_like(d, 1e-8), d)
    near, far = (-half * safe.sign() - o) / safe, (half * safe.sign() - o) / safe
    t, axis = near.max(0)
    hit = (t < far.min(0).values) & (t > 0)
    normal = -torch.nn.functional.one_hot(axis, 3).T.to(d.dtype) * safe.sign()
    return torch.where(hit, t, FAR), normal


def nearest_of(t: Tensor, normal: Tensor, other: Tensor, other_normal: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the nearer of two hits."""
    first = t <= other
    return torch.where(first, t, other), torch.where(first, normal, other_normal)


def hit_cap(o: Tensor, d: Tensor, radius: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Meet a level disc at height y."""
    t = (y - o[1]) / torch.where(d[1].abs() < 1e-8, torch.full_like(d[1], 1e-8), d[1])
    p = o + t * d
    hit = (t > 0) & (p[0] ** 2 + p[2] ** 2 < radius**2)
    up = torch.zeros_like(d)
    up[1] = -d[1].sign()
    return torch.where(hit, t, FAR), up


def hit_round(o: Tensor, d: Tensor, radius: Tensor, height: Tensor, taper: float) -> tuple[Tensor, Tensor]:
    """Meet the side of a cylinder (taper 0) or a cone (taper 1): x² + z² = (radius (1 - taper y / height))²."""
    slope = taper * radius / height
    reach = radius - slope * o[1]  # the radius at the ray's start
    a = d[0] ** 2 + d[2] ** 2 - (slope * d[1]) ** 2
    b = o[0] * d[0] + o[2] * d[2] + slope * d[1] * reach
    c = o[0] ** 2 + o[2] ** 2 - reach**2
    a = torch.where(a.abs() < 1e-8, torch.full_like(a, 1e-8), a)
    root = b * b - a * c
    sqrt = root.clamp(min=0).sqrt()
    best = torch.full_like(b, FAR)
    for t in ((-b - sqrt) / a, (-b + sqrt) / a):
        y = o[1] + t * d[1]
        good = (root > 0) & (t > 0) & (y > 0) & (y < height) & (t < best)
        best = torch.where(good, t, best)
    p = o + best * d
    normal = torch.stack([p[0], slope * (radius - slope * p[1]), p[2]])
    return best, normal / normal.norm(dim=0).clamp(min=1e-8)


def hit_cylinder(o: Tensor, d: Tensor, radius: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """Meet an upright cylinder with its lid."""
    return nearest_of(*hit_round(o, d, radius, height, 0.0), *hit_cap(o, d, radius, height))


def hit_cone(o: Tensor, d: Tensor, radius: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """Meet an upright cone; its base lies on the floor, where no ray can see it."""
    return hit_round(o, d, radius, height, 1.0)


def hit_torus(o: Tensor, d: Tensor, radius: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """Meet a ring that lies on the floor, by walking along the distance to it; only rays near it walk."""
    tube = height / 2
    ring = radius - tube
    o = o - torch.stack([torch.zeros_like(tube), tube, torch.zeros_like(tube)])
    b, c = (o * d).sum(0), (o * o).sum(0) - (radius * 1.02) ** 2
    near = b * b - c
    best, normal = torch.full_like(b, FAR), torch.zeros_like(o)
    index = ((near > 0) & (-b > 0)).nonzero().squeeze(1)
    oi, di, ring, tube = o[:, index], d[:, index], ring[index], tube[index]
    t = (-b - near.clamp(min=0).sqrt())[index].clamp(min=0)
    for _ in range(40):
        p = oi + t * di
        flat = (p[0] ** 2 + p[2] ** 2).sqrt()
        distance = ((flat - ring) ** 2 + p[1] ** 2).sqrt() - tube
        t = t + distance
    hit = distance.abs() < 2e-3
    p = oi + t * di
    flat = (p[0] ** 2 + p[2] ** 2).sqrt().clamp(min=1e-6)
    n = torch.stack([p[0] * (1 - ring / flat), p[1], p[2] * (1 - ring / flat)]) / tube
    best[index] = torch.where(hit, t, FAR)
    normal[:, index] = n
    return best, normal


HITS = {
    "sphere": hit_sphere,
    "cube": hit_cube,
    "cylinder": hit_cylinder,
    "cone": hit_cone,
    "torus": hit_torus,
}


def turned(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn vectors (3, K, R) about the vertical axis."""
    return torch.stack([cos * v[0] + sin * v[2], v[1], cos * v[2] - sin * v[0]])


@dataclass
class Table:
    """The objects of S scenes as tensors, so that all of one shape are met at once."""

    scene: Tensor
    slot: Tensor
    shape: Tensor
    numbers: Tensor = field(repr=False)  # (6, objects): x, z, radius, height, cos, sin

    @classmethod
    def of(cls, scenes: list[Scene]) -> Table:
        """List all objects."""
        rows = [(s, k, body) for s, scene in enumerate(scenes) for k, body in enumerate(scene.bodies)]
        numbers = [(b.x, b.z, b.radius, b.height, math.cos(b.turn), math.sin(b.turn)) for _, _, b in rows]
        return cls(
            torch.tensor([s for s, _, _ in rows]),
            torch.tensor([k for _, k, _ in rows]),
            torch.tensor([SHAPES.index(b.shape) for _, _, b in rows]),
            torch.tensor(numbers).T.contiguous(),
        )

    def meet(self, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find the first object that each ray meets.

        Args:
            origin: (3, S, R).
            direction: (3, S, R), of length 1.

        Returns:
            Distance (S, R), FAR where there is none; the object's slot (S, R), -1 there; the normal (3, S, R).
        """
        distance = torch.full(direction.shape[1:], FAR)
        slot = torch.full(direction.shape[1:], -1)
        normal = torch.zeros_like(direction)
        for i, shape in enumerate(SHAPES):
            for j in (self.shape == i).nonzero().squeeze(1).tolist():
                s = int(self.scene[j])
                x, z, radius, height, cos, sin = self.numbers[:, j]
                o, d = origin[:, s], direction[:, s]
                place = torch.stack([x, torch.zeros(()), z])[:, None]
                o, d = turned(o - place, cos, sin), turned(d, cos, sin)
                count = d.shape[1]
                t, n = HITS[shape](o, d, radius.expand(count), height.expand(count))
                closer = (t > 1e-4) & (t < distance[s])
                distance[s] = torch.where(closer, t, distance[s])
                slot[s] = torch.where(closer, int(self.slot[j]), slot[s])
                normal[:, s] = torch.where(closer, turned(n, cos, -sin), normal[:, s])
        return distance, slot, normal


def camera_rays(scenes: list[Scene], side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make one ray through each of side x side places of the pictures: origins, directions (3, S, R), axes (3, S)."""
    eye = torch.tensor([scene.camera for scene in scenes]).T  # (3, S)
    aim = torch.tensor([scene.look_at for scene in scenes]).T
    axis = torch.nn.functional.normalize(aim - eye, dim=0)
    right = torch.nn.functional.normalize(torch.stack([-axis[2], torch.zeros_like(axis[0]), axis[0]]), dim=0)
    up = torch.linalg.cross(right, axis, dim=0)
    spread = math.tan(math.radians(21))
    place = (torch.arange(side) + 0.5) / side * 2 - 1
    v, u = torch.meshgrid(-place, place, indexing="ij")
    u, v = u.flatten() * spread, v.flatten() * spread
    d = axis[:, :, None] + u * right[:, :, None] + v * up[:, :, None]
    d = torch.nn.functional.normalize(d, dim=0)
    return eye[:, :, None].expand_as(d), d, axis


# Looks


def fade(x: Tensor) -> Tensor:
    """Turn a wave in [-1, 1] into stripes with soft edges in [0, 1]."""
    return (x * 6).clamp(-1, 1) * 0.5 + 0.5


def wood(p: Tensor, phase: Tensor) -> Tensor:
    """Grain, 0.6..1, of places (3, ...)."""
    rings = torch.sin(14 * p[0] + 3 * torch.sin(2.1 * p[2] + phase) + 1.7 * p[1])
    return 0.82 + 0.18 * rings * torch.cos(1.3 * p[2] + phase)


def marble(p: Tensor, phase: Tensor) -> Tensor:
    """Veins, 0..1, of places (3, ...)."""
    flow = p[0] + 0.7 * p[1] + 0.5 * p[2]
    return torch.sin(5 * flow + 4 * torch.sin(2.3 * p[1] + phase) * torch.cos(1.9 * p[2] - phase)).abs() ** 0.35


def paint_objects(scenes: list[Scene], p: Tensor, slot: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
    """Give each place on an object its colour (3, S, R), and say how much of a mirror it is (S, R)."""
    colours = torch.zeros(len(scenes), MAX_OBJECTS, 3)
    kinds = torch.zeros(len(scenes), MAX_OBJECTS, dtype=torch.int64)
    heights = torch.ones(len(scenes), MAX_OBJECTS)
    for s, scene in enumerate(scenes):
        for k, (body, skin) in enumerate(zip(scene.bodies, scene.skins, strict=True)):
            colours[s, k] = torch.tensor(COLOURS[skin.colour])
            kinds[s, k] = MATERIALS.index(skin.material)
            heights[s, k] = body.height
    index = slot.clamp(min=0)
    base = torch.gather(colours, 1, index[:, :, None].expand(-1, -1, 3)).movedim(2, 0)
    kind = torch.gather(kinds, 1, index)
    pale = 0.5 * base + 0.45
    dark = 0.25 * base
    second = torch.where(base.mean(0) > 0.5, dark, pale)
    stripes = fade(torch.sin(p[1] * 15))
    checks = fade(torch.sin(p[0] * 9 + phase) * torch.sin(p[1] * 9 + 0.5) * torch.sin(p[2] * 9 + phase))
    share = torch.ones_like(p[0])
    share = torch.where(kind == MATERIALS.index("striped"), 0.25 + 0.75 * stripes, share)
    share = torch.where(kind == MATERIALS.index("chequered"), 0.25 + 0.75 * checks, share)
    share = torch.where(kind == MATERIALS.index("marble"), 0.35 + 0.65 * marble(p * 1.6, phase), share)
    colour = share * base + (1 - share) * second
    grain = torch.where(kind == MATERIALS.index("wooden"), wood(p * 1.4, phase) * 0.95, torch.ones_like(p[0]))
    return colour * grain, (kind == MATERIALS.index("metal")).to(p.dtype)


def paint_room(scenes: list[Scene], p: Tensor, on_wall: Tensor, phase: Tensor) -> Tensor:
    """Give each place on floor and wall its colour (3, S, R)."""
    floor = torch.tensor([FLOORS[scene.floor] for scene in scenes]).T[:, :, None]
    wall = torch.tensor([WALLS[scene.wall] for scene in scenes]).T[:, :, None]
    kinds = torch.tensor([list(FLOORS).index(scene.floor) for scene in scenes])[:, None]
    boards = wood(torch.stack([p[0] * 0.45, p[1], p[2] * 1.2]), phase)
    gaps = 1 - 0.35 * (torch.sin(p[0] * 3.5).abs() < 0.03).to(p.dtype)
    checks = 0.3 + 0.7 * fade(torch.sin(p[0] * 3.1) * torch.sin(p[2] * 3.1))
    shade = torch.where(kinds == list(FLOORS).index("wooden"), boards * gaps, torch.ones_like(p[0]))
    shade = torch.where(kinds == list(FLOORS).index("chequered"), checks, shade)
    return torch.where(on_wall, wall, floor * shade)


def render(scenes: list[Scene], size: int = SIZE) -> Rendered:
    """Render scenes.

    Args:
        scenes: S of them.
        size: height and width in pixels.
    """
    side = size * SAMPLES
    origin, direction, axis = camera_rays(scenes, side)
    table = Table.of(scenes)
    t_object, slot, normal = table.meet(origin, direction)
    wall_z = torch.tensor([scene.wall_z for scene in scenes])[:, None]
    t_floor = torch.where(direction[1] < -1e-6, -origin[1] / direction[1].clamp(max=-1e-6), FAR)
    t_wall = torch.where(direction[2] < -1e-6, (wall_z - origin[2]) / direction[2].clamp(max=-1e-6), FAR)
    t_room = torch.minimum(t_floor, t_wall)
    on_object = t_object < t_room
    slot = torch.where(on_object, slot, -1)
    t = torch.where(on_object, t_object, t_room)
    p = origin + t * direction

    on_wall = ~on_object & (t_wall < t_floor)
    room_normal = torch.stack([torch.zeros_like(t), (~on_wall).to(t.dtype), on_wall.to(t.dtype)])
    normal = torch.where(on_object, normal, room_normal)
    phase = torch.tensor([scene.pattern for scene in scenes])[:, None]
    objects, metal = paint_objects(scenes, p, slot, phase)
    colour = torch.where(on_object, objects, paint_room(scenes, p, on_wall, phase))
    image = shade(scenes, table, p, normal, direction, colour, metal * on_object)

    along = (direction * axis[:, :, None]).sum(0)
    pooled = _pool(image.movedim(1, 0), size)
    slots = torch.nn.functional.one_hot(slot + 1, MAX_OBJECTS + 1).to(t.dtype).movedim(2, 1)  # (S, 5, R)
    return Rendered(
        pooled.clamp(0, 1),
        _pool((1 / (t * along))[:, None], size)[:, 0],
        _pool(slots, size).argmax(dim=1),
        _pool((1 / (t_room * along))[:, None], size)[:, 0],
    )


def _pool(x: Tensor, size: int) -> Tensor:
    """Average the rays of each pixel: (S, C, R) -> (S, C, size, size)."""
    return torch.nn.functional.avg_pool2d(x.unflatten(2, (size * SAMPLES, size * SAMPLES)), SAMPLES)


def shade(
    scenes: list[Scene], table: Table, p: Tensor, normal: Tensor, direction: Tensor, colour: Tensor, metal: Tensor
) -> Tensor:
    """Light places: what comes from everywhere, from the lamp unless it is hidden, and highlights (3, S, R)."""
    lamps = [LIGHTS[scene.light] for scene in scenes]
    ambient = torch.tensor([lamp.ambient for lamp in lamps]).T[:, :, None]
    power = torch.tensor([lamp.lamp for lamp in lamps]).T[:, :, None]
    place = torch.tensor([(s.lamp_side, lamp.height, 3.0) for s, lamp in zip(scenes, lamps, strict=True)]).T[:, :, None]
    ray = torch.arange(p.shape[2])
    side = math.isqrt(p.shape[2])
    column, row = ray % side % 2 - 0.5, ray // side % 2 - 0.5
    shift = torch.stack([column, torch.zeros_like(column), row]) * 0.9  # the rays of a pixel see a lamp of some width
    to_lamp = place + shift[:, None] - p
    to_lamp = to_lamp / to_lamp.norm(dim=0)
    facing = (normal * to_lamp).sum(0).clamp(min=0)
    blocked, _, _ = table.meet(p + normal * 2e-3, to_lamp)
    lit = (blocked >= FAR).to(p.dtype)
    half = torch.nn.functional.normalize(to_lamp - direction, dim=0)
    glint = (normal * half).sum(0).clamp(min=0)
    sky = 0.75 + 0.25 * normal[1]
    diffuse = colour * (ambient * sky + power * facing * lit * (1 - 0.35 * metal))
    mirrored = direction - 2 * (direction * normal).sum(0) * normal
    reflected = (0.55 + 0.45 * torch.tanh(3 * mirrored[1])) * (ambient + power) * 0.8
    shine = power * lit * (0.25 * glint**24 * (1 - metal) + 0.9 * glint**60 * metal)
    return diffuse + metal * colour * reflected + shine * (metal + (1 - metal) * 0.8)


def to_pictures(image: Tensor) -> np.ndarray:
    """Turn images (S, 3, H, W) in 0..1 into bytes (S, H, W, 3)."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, 3).numpy()


def main(path: str) -> None:
    """Draw a sheet: scenes, their depth, and the same geometry with another look."""
    from PIL import Image

    scenes = [random_scene(seed) for seed in range(8)]
    again = [repaint(scene, seed + 1000) for seed, scene in enumerate(scenes)]
    first, second = render(scenes), render(again)
    depth = first.disparity - first.disparity.amin((1, 2), keepdim=True)
    depth = (depth / depth.amax((1, 2), keepdim=True))[:, None].expand(-1, 3, -1, -1)
    rows = [to_pictures(x) for x in (first.image, depth, second.image)]
    Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows])).save(path)
    for seed, (one, two) in enumerate(zip(scenes, again, strict=True)):
        print(f"{seed}: {caption(one, seed)} | {caption(two, seed + 1000)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
