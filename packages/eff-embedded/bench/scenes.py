"""Times a scene of eight objects with all its maps, on one thread; appends to results/scenes.jsonl.

``python packages/eff-embedded/bench/scenes.py`` takes about half a minute. Each call draws another of twelve scenes.
"""

from pathlib import Path

import torch
from eff_embedded import scenes
from eff_kernels.testing.records import Provider, Recorder

HERE = Path(__file__).parent
SOURCES = (HERE.parent / "src" / "eff_embedded" / "scenes",)
COUNT = 12
CONFIG = scenes.SceneConfig(num_objects=(8, 8), floating=0.4, speed=(0.1, 0.4), spin=(10, 60))


def main():
    torch.set_num_threads(1)
    worlds = [scenes.make_scene(CONFIG, seed=k) for k in range(COUNT)]
    cameras = [scenes.make_camera(world, seed=k) for k, world in enumerate(worlds)]
    panoramas = [scenes.make_panorama(world, seed=k, height=128) for k, world in enumerate(worlds)]

    def picture(k, *, antialias=1):
        return scenes.render(worlds[k % COUNT], cameras[k % COUNT], antialias=antialias)

    def flow(k):
        camera = cameras[k % COUNT]
        return scenes.optical_flow(worlds[k % COUNT], camera, 0.0, camera, 0.5)

    def exact():
        views = [picture(k) for k in range(COUNT)]
        errors = [(scenes.unproject_depth(v.depth, v.intrinsics, v.extrinsics) - v.points).abs().max() for v in views]
        return max(errors) < 1e-5

    recorder = Recorder("scenes", HERE / "results" / "scenes.jsonl", sources=SOURCES)
    cases = {
        "all maps": picture,
        "all maps and flow": lambda k: (picture(k), flow(k)),
        "all maps, 4 rays a pixel": lambda k: picture(k, antialias=2),
    }
    for mode, run in cases.items():
        recorder.run("128x128, 8 objects", [Provider("eff", run, backend="numpy", check=exact)], mode=mode, rounds=36)

    def wide(k):
        return scenes.render(worlds[k % COUNT], panoramas[k % COUNT])

    def wide_exact():
        """Points lie at their distance along the rays of the panorama."""
        errors = []
        for k, camera in enumerate(panoramas):
            view = wide(k)
            rays = torch.tensor(camera.lens.rays()).view_as(view.points).float()
            turned = view.extrinsics[:3, :3].T @ (rays * view.distance).flatten(1)
            found = turned.view_as(rays) + torch.tensor(camera.position)[:, None, None]
            errors.append((found - view.points).abs()[:, view.valid].max())
        return max(errors) < 1e-5

    def placed():
        """Eight objects, and none holds the middle of another."""
        made = [scenes.make_scene(CONFIG, seed=k).objects for k in range(COUNT)]
        apart = (not a.holds(b.centre, 0.0) for things in made for a in things for b in things if a is not b)
        return all(len(things) == 8 for things in made) and all(apart)

    panorama = Provider("eff", wide, backend="numpy", check=wide_exact)
    recorder.run("256x128 panorama, 8 objects", [panorama], mode="all maps", rounds=36)
    invent = Provider("eff", lambda k: scenes.make_scene(CONFIG, seed=k), backend="numpy", check=placed)
    recorder.run("8 objects", [invent], mode="placing", rounds=36)
    print(recorder.table())


if __name__ == "__main__":
    main()
