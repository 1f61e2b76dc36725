"""PyHealth's AttentionRollout and ours on the same model: one import line differs, the numbers do not.

    python examples/pyhealth_dropin.py

Needs the pyhealth extra. Trains a two-layer Transformer for a moment on handmade records, attributes them with both
interpreters and prints how far apart they are; then does what PyHealth's cannot: attributes it under
torch.inference_mode(), with the parameters frozen.
"""

import logging
import random
import time

import torch
from pyhealth.datasets import create_sample_dataset, get_dataloader
from pyhealth.interpret.methods import AttentionRollout as PyHealthRollout
from pyhealth.models import Transformer

from rollout.pyhealth import AttentionRollout

CONDITIONS = ["I10", "E11.9", "N18.3", "I50.9", "J44.9", "E78.5", "F32.9", "M54.5"]
DRUGS = ["metformin", "lisinopril", "furosemide", "atorvastatin", "albuterol"]


def records(count: int) -> list[dict]:
    """Handmade patients: heart failure (I50.9) without furosemide is the risk."""
    draw = random.Random(0)
    samples = []
    for i in range(count):
        conditions = draw.sample(CONDITIONS, draw.randint(1, len(CONDITIONS)))
        drugs = draw.sample(DRUGS, draw.randint(1, len(DRUGS)))
        risk = "I50.9" in conditions and "furosemide" not in drugs
        samples.append(
            {"patient_id": f"p{i}", "visit_id": f"v{i}", "conditions": conditions, "drugs": drugs, "label": int(risk)}
        )
    return samples


def train(model: Transformer, loader: object, epochs: int = 4) -> float:
    """A few epochs of Adam; the last loss."""
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for batch in loader:
            optimiser.zero_grad()
            loss = model(**batch)["loss"]
            loss.backward()
            optimiser.step()
    return float(loss.detach())


def timed(interpreter: object, batch: dict) -> tuple[dict[str, torch.Tensor], float]:
    """The attributions and the seconds they took, the second time round."""
    interpreter.attribute(**batch)
    start = time.perf_counter()
    return interpreter.attribute(**batch), time.perf_counter() - start


def main() -> None:
    logging.disable(logging.INFO)
    torch.manual_seed(0)
    schema = {"conditions": "sequence", "drugs": "sequence"}
    dataset = create_sample_dataset(records(256), schema, {"label": "binary"}, dataset_name="handmade")
    model = Transformer(dataset, embedding_dim=32, heads=4, num_layers=2, dropout=0.1)
    loss = train(model, get_dataloader(dataset, batch_size=32, shuffle=True))
    batch = next(iter(get_dataloader(dataset, batch_size=256, shuffle=False)))

    theirs, their_seconds = timed(PyHealthRollout(model), batch)
    ours, our_seconds = timed(AttentionRollout(model), batch)

    print(f"256 records, loss {loss:.3f} after training")
    for key in theirs:
        difference = float((ours[key] - theirs[key]).abs().max())
        print(f"{key:<10} {list(ours[key].shape)}  largest difference {difference:.1e}")
        assert difference < 1e-5
    print(f"PyHealth {1e3 * their_seconds:.1f} ms, ours {1e3 * our_seconds:.1f} ms")

    model.requires_grad_(False)
    with torch.inference_mode():
        frozen = AttentionRollout(model).attribute(**batch)
        try:
            PyHealthRollout(model).attribute(**batch)
        except RuntimeError as error:
            print(f"frozen, under inference_mode: PyHealth's raises ({error})")
    print(f"ours gives the same numbers: {all(torch.equal(frozen[key], ours[key]) for key in ours)}")

    names = {index: code for code, index in dataset.input_processors["conditions"].code_vocab.items()}
    print("\nthe first record, by relevance:")
    scores = ours["conditions"][0]
    for position in scores.argsort(descending=True)[: int((batch["conditions"][0] != 0).sum())].tolist():
        print(f"  {names[int(batch['conditions'][0, position])]:<6} {float(scores[position]):.3f}")


if __name__ == "__main__":
    main()
