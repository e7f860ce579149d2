"""Multiple choice by log-likelihood, the perplexity of texts, and a report to look at.

python examples/scoring.py [--model-path FOLDER_OR_HUB_ID] [--report scores.html]
"""

import argparse

import jaxengine
from jaxengine.report import write_report

QUESTION = "The import statement"
CHOICES = [" is executed in two steps.", " is a kind of fruit.", " sings a song."]

parser = argparse.ArgumentParser(description="Score texts.")
parser.add_argument("--model-path", help="default: the embedded model")
parser.add_argument("--report", help="write an HTML page with every token's log-probability")
args = parser.parse_args()
llm = jaxengine.Engine(model_path=args.model_path)

# The question is computed once, however many choices there are.
likelihoods = llm.loglikelihood([QUESTION] * len(CHOICES), CHOICES)
for choice, likelihood in zip(CHOICES, likelihoods, strict=True):
    print(f"{likelihood.sum:8.2f}  {QUESTION}{choice}")
best = CHOICES[max(range(len(CHOICES)), key=lambda i: likelihoods[i].sum)]
print(f"likeliest: {best.strip()}")

texts = [QUESTION + choice for choice in CHOICES]
for text, perplexity in zip(texts, llm.perplexity(texts), strict=True):
    print(f"{perplexity:8.1f}  {text}")

if args.report:
    results = llm.generate(
        texts,
        {"max_new_tokens": 0},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=10,
    )
    print(write_report(args.report, results, tokenizer=llm.tokenizer))

llm.shutdown()
