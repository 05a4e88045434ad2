"""GRPO: word problems of GSM8K where there is a GPU, the tasks inside ftkit on a laptop

    python examples/grpo.py OUT [--steps N] [--model NAME] [--data FILE]

FILE has a JSON object with `question` and `answer` in each line, as GSM8K; its train split on the Hub by default. The
profile of the machine says how it is loaded and in which precision (a T4: four bits, fp16, no other engine). The
embedded model is first shown the form of an answer. Prints a rehearsal, and stops there if nothing can be learned.
"""
import argparse, json
from pathlib import Path
from ftkit.core import profile
from ftkit.models import load_model, load_tokenizer
from ftkit.rewards import numeric, solved
from ftkit.rl import rehearse, rl
from ftkit.tasks import rows
from ftkit.train import train

ASK = 'Think step by step, then write the answer after ####.\n\n'
FAMILIES = 'add', 'spell', 'reverse', 'opposite'

def word_problems(file):
    "Prompts with the answer in a column of its own"
    if file: found = map(json.loads, Path(file).read_text().splitlines())
    else:
        from datasets import load_dataset
        found = load_dataset('openai/gsm8k', 'main', split='train')
    return [dict(prompt=ASK + r['question'], answer=r['answer']) for r in found]

def tasks(tok, model, out):
    "Prompts of ftkit's tasks, for a model that has seen how they are answered"
    train(model, tok, rows(1600, families=FAMILIES), out=out/'sft', max_steps=80, learning_rate=3e-3, overwrite=True,
          per_device_train_batch_size=16)
    return [dict(prompt=r['messages'][0]['content'], family=r['family'], answer=r['answer'])
            for r in rows(1200, families=FAMILIES, seed=1)]

def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('out', type=Path)
    for name,kind in (('steps', int), ('model', str), ('data', str)): args.add_argument(f'--{name}', type=kind)
    a = args.parse_args()
    p = profile(model=a.model)
    tok = load_tokenizer(p.tokenizer)
    model,small = load_model(p.model, tok, p.adapter, p.precision),p.model == 'embedded' and not a.data
    data,reward = (tasks(tok, model, a.out), solved) if small else (word_problems(a.data), numeric)
    how = dict(max_new_tokens=16 if small else 400, learning_rate=1e-3 if small else 2e-5, precision=p.precision)
    look = rehearse(model, tok, data, reward, **how)
    print(look)
    if look.findings: return
    run = rl(model, tok, data, reward, 'dapo', a.out/'rl', overwrite=True, steps=a.steps or (100 if small else 200),
             prompts_per_step=16 if small else 8, **how)
    print(f"reward {run.log[0]['reward']:.2f} to {run.log[-1]['reward']:.2f}; ftkit chat {run.adapter}")

if __name__ == '__main__': main()
