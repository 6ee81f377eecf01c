import json
import struct

import pytest
import torch
from eff_vision.geometry import intrinsics_from_fov, invert_pose, project, rotation_from_yaw_pitch
from eff_vision.geometry.formats import (
    PosedViews,
    read_colmap,
    read_glb,
    read_ply,
    read_transforms,
    write_colmap,
    write_glb,
    write_ply,
    write_transforms,
)


def views(count=4):
    draw = torch.Generator().manual_seed(0)
    turn = rotation_from_yaw_pitch(torch.rand(count, generator=draw) * 6, torch.rand(count, generator=draw) * 3 - 1.5)
    extrinsics = torch.cat((turn.double(), torch.randn(count, 3, 1, generator=draw).double()), -1)
    k = intrinsics_from_fov(torch.rand(count, generator=draw) + 0.5, 48, 64).double()
    k[:, 0, 2] += 3.25
    return PosedViews(tuple(f"view {i}.png" for i in range(count)), (48, 64), extrinsics, k)


@pytest.mark.parametrize("form", ["colmap", "transforms"])
def test_cameras_come_back(form, tmp_path):
    mine = views()
    if form == "colmap":
        write_colmap(tmp_path / "m", mine, torch.randn(3, 3))
        found = read_colmap(tmp_path / "m")
    else:
        write_transforms(tmp_path / "t.json", mine)
        found = read_transforms(tmp_path / "t.json")
    assert found.names == mine.names
    assert found.size == mine.size
    torch.testing.assert_close(found.extrinsics, mine.extrinsics, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.intrinsics, mine.intrinsics, rtol=0, atol=1e-9)


def test_conventions_by_hand(tmp_path):
    # A camera at (0, 0, -2) of our world looks along z; in OpenGL's terms it looks along -z of its own frame.
    pose = torch.cat((torch.eye(3), torch.tensor([[0.0], [0.0], [2.0]])), 1)[None]
    one = PosedViews(("a.png",), (10, 10), pose, intrinsics_from_fov(1.0, 10, 10)[None])
    write_transforms(tmp_path / "t.json", one)
    matrix = torch.tensor(json.loads((tmp_path / "t.json").read_text())["frames"][0]["transform_matrix"])
    torch.testing.assert_close(matrix[:3, 3], torch.tensor([0.0, 0.0, -2.0]))
    point = torch.tensor([0.3, -0.2, 1.0])
    seen = torch.linalg.inv(matrix) @ torch.cat((point, torch.ones(1)))
    ours = pose[0, :, :3] @ point + pose[0, :, 3]
    torch.testing.assert_close(seen[:3] * torch.tensor([1.0, -1, -1]), ours)
    write_colmap(tmp_path / "m", one)
    line = (tmp_path / "m" / "images.txt").read_text().splitlines()[1].split()
    assert [float(v) for v in line[1:8]] == [1, 0, 0, 0, 0, 0, 2]


def test_pictures_of_nerf_with_one_angle(tmp_path):
    found = {
        "w": 64,
        "h": 48,
        "camera_angle_x": 1.1,
        "frames": [{"file_path": "a", "transform_matrix": torch.eye(4).tolist()}],
    }
    (tmp_path / "t.json").write_text(json.dumps(found))
    read = read_transforms(tmp_path / "t.json")
    torch.testing.assert_close(read.intrinsics[0].float(), intrinsics_from_fov(1.1, 48, 64))
    ahead, depth = project(torch.tensor([[0.0, 0.0, -3.0]]).double(), read.intrinsics[0], read.extrinsics[0])
    assert ahead[0].tolist() == [32, 24]
    assert depth[0] == 3
    torch.testing.assert_close(invert_pose(read.extrinsics[0])[:, 3], torch.zeros(3).double())
    for change, text in (
        ({"k1": 0.1}, "distortion"),
        ({"camera_angle_x": None}, "fl_x"),
        ({"w": 0}, "w and h"),
        ({"frames": []}, "no frames"),
    ):
        bad = {k: v for k, v in {**found, **change}.items() if v is not None}
        (tmp_path / "b.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=text):
            read_transforms(tmp_path / "b.json")


@pytest.mark.parametrize(("write", "read", "name"), [(write_ply, read_ply, "c.ply"), (write_glb, read_glb, "c.glb")])
@pytest.mark.parametrize("coloured", [True, False])
def test_points_come_back(write, read, name, coloured, tmp_path):
    points, colours = torch.randn(17, 3), torch.rand(17, 3) if coloured else None
    write(tmp_path / name, points, colours)
    found, shades = read(tmp_path / name)
    assert torch.equal(found, points)
    assert (shades is None) == (colours is None)
    if coloured:
        torch.testing.assert_close(shades, colours, rtol=0, atol=0.5 / 255 + 1e-6)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-5])
    with pytest.raises(ValueError, match=r"complete|bytes"):
        read(tmp_path / name)
    for bad, text in ((points * torch.nan, "not finite"), (points[:, :2], r"\[N, 3\]")):
        with pytest.raises(ValueError, match=text):
            write(tmp_path / name, bad)


@pytest.mark.parametrize(("write", "read", "name"), [(write_ply, read_ply, "c.ply"), (write_glb, read_glb, "c.glb")])
def test_colours_beyond_the_range_are_its_ends(write, read, name, tmp_path):
    write(tmp_path / name, torch.zeros(3, 3), torch.tensor([[-0.1, 0.0, 0.5], [1.0, 1.2, 9.0], [-5.0, 1.01, 0.0]]))
    wanted = torch.tensor([[0.0, 0.0, 0.5], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(read(tmp_path / name)[1], wanted, rtol=0, atol=0.5 / 255 + 1e-6)


def test_glb_is_gltf(tmp_path):
    write_glb(tmp_path / "c.glb", torch.randn(5, 3), torch.rand(5, 3))
    data = (tmp_path / "c.glb").read_bytes()
    assert struct.unpack_from("<4sII", data) == (b"glTF", 2, len(data))
    assert len(data) % 4 == 0
    with pytest.raises(ValueError, match="no empty"):
        write_glb(tmp_path / "c.glb", torch.zeros(0, 3))


def test_refuses(tmp_path):
    mine = views(2)
    with pytest.raises(ValueError, match="2 names"):
        write_colmap(tmp_path, mine._replace(intrinsics=mine.intrinsics[:1]))
    with pytest.raises(ValueError, match="name of a picture"):
        write_colmap(tmp_path, mine._replace(names=("a\n", "b")))
    write_colmap(tmp_path / "m", mine)
    text = (tmp_path / "m" / "cameras.txt").read_text()
    (tmp_path / "m" / "cameras.txt").write_text(text.replace("PINHOLE", "OPENCV", 1))
    with pytest.raises(ValueError, match="undistort"):
        read_colmap(tmp_path / "m")
    (tmp_path / "x.ply").write_bytes(b"plx")
    with pytest.raises(ValueError, match="not a PLY"):
        read_ply(tmp_path / "x.ply")
