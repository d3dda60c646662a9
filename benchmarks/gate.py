"""How often the gate promotes a model that is no better, and how often one that is: simulated comparisons.

    uv run python benchmarks/gate.py

Scores are drawn as the toy benchmark gives them: fidelity is the share of five attributes per subject, confusion that of the
slots, with a difficulty of the prompt that both models share. "Equal" models differ in noise alone; "worse" ones lose fidelity;
"better" ones gain it, or lose confusion, as planted.
"""

from __future__ import annotations

import numpy as np
from recording import describe_machine, write_result

from refalign.config import GateConfig
from refalign.evaluation.gate import decide

SIMULATIONS, PROMPTS = 200, 224
PLANTED = {
    "equal": {},
    "worse in fidelity by .05": {"fidelity": -0.05},
    "worse in fidelity by .05, better in confusion by .15": {"fidelity": -0.05, "confusion": -0.15},
    "better in fidelity by .10": {"fidelity": 0.10},
    "better in confusion by .15": {"confusion": -0.15},
    "better in copy-paste by .15": {"copy_paste": -0.15},
}


def simulate(rng: np.random.Generator, effects: dict[str, float]) -> tuple[dict, dict]:
    """Scores by prompt of a champion and a challenger whose means differ by ``effects``."""
    champion, challenger = {}, {}
    for prompt in range(PROMPTS):
        subjects = int(rng.integers(1, 4))
        easy, apart = rng.beta(3, 2), rng.beta(2, 4)
        for scores, shift in ((champion, {}), (challenger, effects)):
            right = np.clip(easy + shift.get("fidelity", 0.0), 0, 1)
            mixed = np.clip(apart + shift.get("confusion", 0.0), 0, 1)
            scores[str(prompt)] = {
                "fidelity": rng.binomial(5 * subjects, right) / (5 * subjects),
                "confusion": rng.binomial(subjects, mixed) / subjects if subjects > 1 else None,
                "copy_paste": float(np.clip(rng.normal(-0.3 + shift.get("copy_paste", 0.0), 0.4), -1, 1)),
            }
    return champion, challenger


def main() -> None:
    machine, rng = describe_machine(), np.random.default_rng(0)
    rates = {}
    for name, effects in PLANTED.items():
        passed = [decide(*simulate(rng, effects), GateConfig(), seed=number).passed for number in range(SIMULATIONS)]
        rates[name] = float(np.mean(passed))
        print(f"{name:56s} promoted {rates[name]:.3f}", flush=True)
    write_result("gate", {"simulations": SIMULATIONS, "prompts": PROMPTS, "promoted": rates}, machine)


if __name__ == "__main__":
    main()
