"""A model that gives its attention maps and the rollout of them in one CUDA graph: one launch on the host a batch.

python examples/cuda_graph.py

A small batch takes a GPU less time than Python takes to ask for it; a graph asks once. Capture it so:

- Call with `validate=False`: checks of values read results back, which a capture refuses.
- Give `query` as an int, or as a tensor that stays where it is; write each batch into the same inputs.
- Run everything a few times on a side stream first: kernels are compiled then, which a capture refuses too.
- Read the result before the next replay, or copy it: a replay writes to the same memory.

Addresses, head weights and start rows are parameters of the launches in the graph, and what they fill belongs to the
graph's own memory: other calls in between, on any stream, touch none of it.

It needs a CUDA device and Triton, and says so where there is none. Not yet run on a GPU.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

import rollout

BATCH, LAYERS, HEADS, SEQ, WIDTH = 8, 12, 12, 197, 192


class Encoder(torch.nn.Module):
    """Self-attention layers that hand over their maps, as a model does when asked for its attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x [B, S, W] -> its last state, and L maps [B, H, S, S]."""
        maps = []
        for layer in self.layers:
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in layer(x).chunk(3, -1))
            maps.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
            x = x + (maps[-1] @ v).transpose(1, 2).flatten(2)
        return x, maps


def explain(model: Encoder, x: Tensor) -> Tensor:
    """The model's forward and what position 0 draws from each input position, [B, S]: what is captured."""
    with torch.no_grad():
        _, maps = model(x)
    return rollout.attention_rollout(maps, query=0, backend="triton", validate=False)


def capture(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of `step`, and the tensor that each replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def milliseconds(step: Callable[[], object], times: int = 50) -> float:
    """The mean time of a step on the device and the host together."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begun) / times


def main() -> int:
    if not torch.cuda.is_available():
        print("examples/cuda_graph.py needs a CUDA device: there is none here, and nothing was run")
        return 0
    torch.manual_seed(0)
    model = Encoder().cuda().eval()
    x = torch.randn(BATCH, SEQ, WIDTH, device="cuda")
    graph, relevance = capture(lambda: explain(model, x))
    for batch in range(3):
        x.copy_(torch.randn(BATCH, SEQ, WIDTH))
        graph.replay()
        same = torch.equal(relevance, explain(model, x))
        print(
            f"batch {batch}: the graph gives {'the same bits as' if same else 'OTHER NUMBERS THAN'} a call outside it"
        )
    print(f"one call at a time: {milliseconds(lambda: explain(model, x)):.3f} ms a batch")
    print(f"one graph:          {milliseconds(graph.replay):.3f} ms a batch")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
