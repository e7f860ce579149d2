"""A way to sample that the engine has not: a pure JAX function, compiled into every step.

python examples/custom_sampler.py [--model-path FOLDER_OR_HUB_ID]

More of them, from papers, are in `examples/samplers/`.
"""

import argparse

import jax.numpy as jnp

import jaxengine


def top_n_sigma(logits, params, row):
    """Keeps logits [V] within n standard deviations of the largest (Tang et al. 2024,
    arXiv:2411.07641). `row` knows the tokens so far, the request's temperature, a random key."""
    sigma = logits.std(where=jnp.isfinite(logits))
    return jnp.where(logits >= logits.max() - params["n"] * sigma, logits, -jnp.inf)


parser = argparse.ArgumentParser(description="Generate with a sampler of one's own.")
parser.add_argument("--model-path", help="default: the embedded model")
llm = jaxengine.Engine(
    model_path=parser.parse_args().model_path,
    logits_processors={
        "top_n_sigma": jaxengine.LogitsProcessor(function=top_n_sigma, params={"n": 1.0})
    },
)

# A request asks for it by name, and may bring parameters of its own: nothing is compiled again.
sampling_params = {"temperature": 2.0, "sampling_seed": 0, "logits_processors": ["top_n_sigma"]}
for n in (0.5, 1.0, 4.0):
    result = llm.generate("A dictionary is", {**sampling_params, "custom_params": {"n": n}})
    print(f"n = {n}: A dictionary is{result['text']}\n")

llm.shutdown()
