"""Load a model, generate from it, and look at its attention entropy.

Usage: python examples/quickstart.py runs/demo/SM+R/seed-0
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_lnfree import AttentionEntropyAnalyzer

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(generator("def read(self, ", max_new_tokens=24, do_sample=False)[0]["generated_text"])
batch = tokenizer(["import os\nimport sys\n", "class Node:\n    def __init__"], padding=True, return_tensors="pt")
print(AttentionEntropyAnalyzer(model).run([batch]))
