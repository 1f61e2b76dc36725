"""What a compiled kernel keeps of the order that its source asks for: barriers around atomics, reads past the cache."""

import re

ATOMIC = r"\b(?:atom|red)\.[\w.]*"
OPERATIONS = {  # in PTX; the first that matches a line is what it is
    "release": re.compile(rf"{ATOMIC}\b(?:acq_rel|release)\b|\bst\.[\w.]*release\b|\bfence\.acq_rel"),
    "acquire": re.compile(rf"{ATOMIC}\bacquire\b|\bld\.[\w.]*acquire\b"),
    "barrier": re.compile(r"\b(?:bar|barrier)\.(?:cta\.)?sync\b"),
    "memory": re.compile(r"\b(?:ld|st)\.global\b|\bcp\.async\b(?!\.(?:commit|wait))"),
}


def operations(ptx: str) -> list[tuple[str, str]]:
    """(kind, line) of every access to global memory and every barrier, in order of the text."""
    found = []
    for line in ptx.splitlines():
        kind = next((kind for kind, pattern in OPERATIONS.items() if pattern.search(line)), None)
        if kind is not None:
            found.append((kind, line.strip()))
    return found


def out_of_order(ptx: str) -> list[str]:
    """Releases that no barrier stands before, since the last access; acquires that no barrier stands after, before the
    next. One that is both is held to both."""
    found = operations(ptx)
    wrong = []
    for place, (kind, line) in enumerate(found):
        if kind == "release":
            before = next((k for k, _ in reversed(found[:place]) if k in ("barrier", "memory", "acquire")), "nothing")
            wrong += [f"no barrier before {line}"] if before != "barrier" else []
        if kind == "acquire" or (kind == "release" and "acq_rel" in line):
            after = next((k for k, _ in found[place + 1 :] if k in ("barrier", "memory")), "nothing")
            wrong += [f"no barrier after {line}"] if after == "memory" else []
    return wrong


def shared_loads(ttir: str, names: tuple[str, ...]) -> list[str]:
    """The loads of a kernel's IR whose address comes from one of the arguments `names`, as text."""
    tainted = {f"%{name}" for name in names}
    lines = ttir.splitlines()
    size = 0
    while size != len(tainted):  # loops hand pointers back to where they began
        size = len(tainted)
        for line in lines:
            head, _, body = line.partition(" = ")
            used = set(re.findall(r"%[\w#]+", body))
            if "!tt.ptr" in body and used & tainted and "tt.load" not in body:
                tainted.add(head.strip().split(":")[0])
            for carried, first in re.findall(r"(%\w+) = (%[\w#]+)", body):  # iter_args of a loop
                if first in tainted:
                    tainted.add(carried)
    return [line.strip() for line in lines if "tt.load" in line and set(re.findall(r"%[\w#]+", line)[1:2]) & tainted]
