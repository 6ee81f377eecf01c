"""What a server may meet: broken requests on the wire, clients that stall or leave, damaged model folders."""

import json
import random
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

from eff_http.half_closed import INTERIM

BODY = json.dumps({"prompt": "Once", "max_tokens": 4, "temperature": 0}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def request(body, head=HEAD, close=True):
    """The bytes of a whole request."""
    end = b"Connection: close\r\n" if close else b""
    return head + end + b"Content-Length: %d\r\n\r\n" % len(body) + body


def broken_bytes(dice):
    """A request that is wrong on the wire in one of many ways."""
    good = request(BODY)
    at = dice.randrange(len(good))
    ways = [
        dice.randbytes(dice.randrange(1, 200)),
        good[:at],
        good[:at] + bytes([dice.randrange(256)]) + good[at + 1 :],
        good[:at] + dice.randbytes(8) + good[at:],
        good.replace(b"Content-Length: ", b"Content-Length: -"),
        good.replace(b"Content-Length: ", b"Content-Length: 9"),
        good.replace(b"Content-Length: ", b"Content-Length: 1\r\nContent-Length: "),
        good.replace(b"HTTP/1.1", dice.choice([b"HTTP/9.9", b"HTTP", b"", b"\x00"])),
        good.replace(b"Host: localhost", b"Host: " + b"a" * dice.choice([10, 70000])),
        HEAD
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + dice.choice([b"zz\r\n", b"5\r\nab", b"ffffffffff\r\n", b"0\r\n\r\n"]),
        HEAD.replace(b"application/json", b"text/plain") + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}",
        request(b"\xff\xfe" + BODY),
        request(b"[" * 5000),
        request(BODY[:-1] + b', "prompt": "twice"}'),
        b"GET /v1/models/"
        + b"%ff%00" * dice.randrange(1, 40)
        + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"\r\n" * dice.randrange(1, 50) + good,
        good * 3,
    ]
    return dice.choice(ways)


def send(port, data, *, half_close=False, seconds=3.0):
    """Send bytes on a connection of its own; what came back until the other side closed or ``seconds`` passed."""
    answer = b""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with suppress(OSError):
            connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            piece = connection.recv(65536)
            if not piece:
                break
            answer += piece
    while answer.startswith(INTERIM):  # the server asks whether anybody listens
        answer = answer[len(INTERIM) :]
    return answer


def stalled(port, data, count):
    """Connections that sent the beginning of a request and go no further."""
    held = []
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        connection.sendall(data)
        held.append(connection)
    return held


def damage(folder, target, dice):
    """A copy of a model folder with one file damaged; says how."""
    shutil.copytree(folder, target)
    files = sorted(p for p in Path(target).iterdir() if p.suffix in (".json", ".safetensors"))
    path = dice.choice(files)
    data = bytearray(path.read_bytes())
    way = dice.choice(["cut", "flip", "empty", "gone", "header", "value"])
    if way == "gone":
        path.unlink()
        return f"{path.name} {way}"
    if way == "cut":
        data = data[: dice.randrange(len(data))]
    elif way == "empty":
        data = bytearray()
    elif way == "header":
        for _ in range(4):
            data[dice.randrange(min(len(data), 400))] = dice.randrange(256)
    elif way == "flip":
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif path.suffix == ".json":
        content = json.loads(bytes(data))
        if isinstance(content, dict) and content:
            content[dice.choice(sorted(content))] = dice.choice([None, -1, 0, 2**40, "x", [], {}, 1e308])
        data = bytearray(json.dumps(content).encode())
    path.write_bytes(bytes(data))
    return f"{path.name} {way}"


def dice_of(seed):
    """Random choices that are the same in every run."""
    return random.Random(seed)
