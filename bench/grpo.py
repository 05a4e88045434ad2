"""GRPO beside TRL's GRPOTrainer: steps per second and memory, both sampling with the model itself

    python bench/grpo.py [STEPS] [ROUNDS]

The embedded model with LoRA, 8 prompts with 8 answers of at most 48 tokens in each step, one update. Two mixes: every
group has answers that differ in reward, and half of the groups have none. Each side runs in a process of its own, in
turns; the better of two runs counts. Three minutes on two cores. Prints a line for each side and mix, and what each
stage of our step takes, beside what its matrix products alone would take at the rate of this machine for products of
its shape: the limit. Kept in bench/results/grpo.json.
"""
import os
os.environ |= dict(TOKENIZERS_PARALLELISM='false', HF_DATASETS_DISABLE_PROGRESS_BARS='1', IN_TEST='1')
import json, resource, subprocess, sys, tempfile, time, zlib
from contextlib import contextmanager
from unittest.mock import patch
import torch
from machine import keep

PROMPTS,GROUP,TOKENS,STEPS = 8,8,48,'10'
GPU = torch.cuda.is_available()

def data():
    "Questions; every second one is of the kind whose answers are all worth the same in the mix 'half'"
    from ftkit.tasks import rows
    return [dict(prompt=r['messages'][:1], dull=i % 2 == 0) for i,r in enumerate(rows(400))]

def reward(mix):
    def worth(completions, dull, **_):
        value = lambda c: (zlib.crc32(c[-1]['content'].encode()) % 1000)/1000
        return [.5 if d and mix == 'half' else value(c) for c,d in zip(completions, dull)]
    return worth

def model():
    from ftkit.models import load_model, load_tokenizer
    tok = load_tokenizer('embedded')
    # without trained rows of tokens, which TRL's trainer cannot read
    return load_model('embedded', tok, precision='fp32', trainable_token_indices=None), tok

OPTIONS = dict(overwrite=True, resample=0, prompts_per_step=PROMPTS, group=GROUP, max_new_tokens=TOKENS,
               learning_rate=1e-5, save_steps=10**6)

def limits(mix, folder):
    "Seconds that the matrix products of each stage would take alone"
    from torch.utils.flop_counter import FlopCounterMode
    from ftkit import rl
    net,tok = model()
    hidden,inner,work = net.config.hidden_size,net.config.intermediate_size,{}
    def rate(rows):
        a,b,times = torch.randn(rows, hidden, device=net.device),torch.randn(hidden, inner, device=net.device),[]
        for _ in range(50):
            start = time.perf_counter()
            for _ in range(10): a@b
            if GPU: torch.cuda.synchronize()
            times.append((time.perf_counter()-start)/10)
        return 2*a.numel()*inner/min(times)
    def counted(stage):
        @contextmanager
        def inside(self, what):
            with FlopCounterMode(display=False) as counter, stage(self, what): yield
            work[what] = counter.get_total_flops()
        return inside
    with patch.object(rl._Run, 'stage', counted(rl._Run.stage)):
        rl.rl(net, tok, data(), reward(mix), 'dapo', f'{folder}/limit', steps=2, **OPTIONS)
    rows = dict({'sample and score': PROMPTS*GROUP}, update=PROMPTS*GROUP*TOKENS//2)
    return {k: work[k]/rate(n) for k,n in rows.items()}

def one(which, mix, steps, folder):
    "Print a run's figures as JSON"
    stages = {}
    def ours(n):
        from ftkit.rl import rl
        net,tok = model()
        run = rl(net, tok, data(), reward(mix), 'dapo', f'{folder}/ftkit', steps=n, **OPTIONS)
        stages.clear()
        for e in run.log[1:]:
            for k,v in e['seconds'].items(): stages[k] = stages.get(k, 0) + v/(n-1)
        return [e['length'] for e in run.log]
    def theirs(n):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
        net,tok = model()
        args = GRPOConfig(f'{folder}/trl', max_steps=n, per_device_train_batch_size=PROMPTS*GROUP, seed=0,
            num_generations=GROUP, max_completion_length=TOKENS, learning_rate=1e-5, use_cpu=not GPU, bf16=False,
            report_to='none', disable_tqdm=True, gradient_checkpointing=False, logging_steps=1, save_strategy='no',
            loss_type='dapo')
        rows = Dataset.from_list(data())
        trainer = GRPOTrainer(net, reward(mix), args=args, train_dataset=rows, processing_class=tok)
        trainer.train()
        return [e['completions/mean_length'] for e in trainer.state.log_history if 'completions/mean_length' in e]
    def timed(n):
        start = time.perf_counter()
        return (ours if which == 'ftkit' else theirs)(n), time.perf_counter()-start
    best = limits(mix, folder) if which == 'ftkit' else {}
    timed(2)
    first,(lengths,whole) = timed(2)[1],timed(steps+2)
    peak = torch.cuda.max_memory_allocated() if GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
    found = dict(seconds=(whole-first)/steps, length=sum(lengths)/len(lengths), peak=peak, stages=stages, limits=best)
    print(json.dumps(found))

def main(steps=STEPS, rounds='2'):
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for mix in ('all', 'half'):
            sides = found[mix] = dict(ftkit=[], trl=[])
            for _ in range(int(rounds)):
                for which,runs in sides.items():
                    out = subprocess.check_output([sys.executable, __file__, which, mix, steps, folder], text=True)
                    runs.append(json.loads(out.splitlines()[-1]))
            a,b = (min(runs, key=lambda r: r['seconds']) for runs in sides.values())
            for which,r in zip(sides, (a, b)):
                print(f"{mix}, {which}: {1/r['seconds']:.2f} steps/s, peak {r['peak']/2**20:,.0f} MiB, "
                      f"{r['length']:.0f} tokens an answer")
            faster,memory = b['seconds']/a['seconds'],a['peak']/b['peak']
            print(f"{mix}: {faster:.2f} times TRL's steps/s, {memory:.2f} of its memory;",
                  ', '.join(f'{k} {v*1000:.0f} ms' + (f" (limit {a['limits'][k]*1000:.0f})" if k in a['limits'] else '')
                            for k,v in a['stages'].items()))
    keep('grpo', mixes=found)

if __name__ == '__main__':
    if sys.argv[1:2] in (['ftkit'], ['trl']): one(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else: main(*sys.argv[1:])
