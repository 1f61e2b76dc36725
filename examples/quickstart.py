"""Attention rollout of a batch with nothing but torch: from maps, from queries and keys, ragged, by other methods.

python examples/quickstart.py
"""

import torch

import rollout

BATCH, LAYERS, HEADS, SEQ, DIM = 3, 4, 2, 6, 8


def show(title: str, relevance: torch.Tensor) -> None:
    """Print a title, and one line of numbers per sample."""
    print(f"\n{title}")
    for row in relevance:
        print("   " + " ".join(f"{value:.4f}" for value in row.tolist()))


def main() -> None:
    torch.manual_seed(0)
    queries = [torch.randn(BATCH, HEADS, SEQ, DIM) for _ in range(LAYERS)]
    keys = [torch.randn(BATCH, HEADS, SEQ, DIM) for _ in range(LAYERS)]
    maps = [(q @ k.transpose(-1, -2) * DIM**-0.5).softmax(-1) for q, k in zip(queries, keys, strict=True)]

    row = rollout.attention_rollout(maps, query=0)
    show("How much position 0 of the top layer draws from each input position:", row)
    full = rollout.attention_rollout(maps)
    print(f"   rows sum to 1; row 0 of the full matrix differs by {float((full[:, 0] - row).abs().max()):.1e}")

    from_qk = rollout.attention_rollout_qk(queries, keys, query=0)
    show("The same from queries and keys, no map ever stored:", from_qk)
    print(f"   largest difference {float((from_qk - row).abs().max()):.1e}")

    lengths = torch.tensor([6, 4, 2])
    ragged = rollout.attention_rollout_qk(queries, keys, query=-1, lengths=lengths)
    show(f"Samples of length {lengths.tolist()}, read at each one's own last position; padding gets exactly 0:", ragged)
    alone = rollout.attention_rollout_qk([q[1:2, :, :4] for q in queries], [k[1:2, :, :4] for k in keys], query=-1)
    print(f"   sample 1 on its own, unpadded, differs by {float((alone - ragged[1:2, :4]).abs().max()):.1e}")

    print("\nSample 0, position 0, by every method that takes attention maps alone:")
    for name, method in rollout.METHODS.items():
        if method.gradients is None and method.values is None and not method.matrices:
            values = rollout.attention_rollout(maps, query=0, method=name)[0]
            print(f"   {name:<15}" + " ".join(f"{value:.4f}" for value in values.tolist()))
    weighted = rollout.Method(head_fusion=torch.tensor([3.0, 1.0]))
    values = rollout.attention_rollout(maps, query=0, method=weighted)[0]
    print(f"   {'heads 3:1':<15}" + " ".join(f"{value:.4f}" for value in values.tolist()))


if __name__ == "__main__":
    main()
