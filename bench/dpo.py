"""DPO on pairs of unequal length, LoRA, a large vocabulary: pairs per second and memory, beside TRL's DPOTrainer

    python bench/dpo.py [STEPS] [ROUNDS]

The model of bench/sft.py and real pairs, the adapter switched off as reference. A CPU takes pairs of at most 512 tokens
a prompt with its answer, four a step, a GPU of 1,024 and sixteen. Both sides learn from the same rows in the same
order. Each runs in a process of its own, in turns; the better of two runs counts. Ten minutes on a CPU. Prints one line
per side, and how many tokens each puts through the model; kept in bench/results/dpo.json.
"""
import os
os.environ |= dict(TOKENIZERS_PARALLELISM='false', HF_DATASETS_DISABLE_PROGRESS_BARS='1', IN_TEST='1')
import json, subprocess, sys, tempfile, time
from machine import DATA, keep
from sft import DEVICE, GPU, PRECISION, SHARED, STEPS, adapted, peak, rate, tokenizer

LENGTH,BATCH = (1024, 16) if GPU else (512, 4)

def pairs(tok):
    "Real pairs where the shared data are; tasks with a wrong answer where not"
    from ftkit.formats import load
    from ftkit.objectives import OBJECTIVES
    from ftkit.tasks import pairs
    path = SHARED/'datasets'/'sharegpt_dpo_en.jsonl'
    return OBJECTIVES['dpo'].prepare(tok, load(path) if path.exists() else pairs(200), LENGTH)

def batches(tok, data, net, n=20):
    "Batches as a run draws them"
    from ftkit.answers import AnswerCollator, on_device
    collate = AnswerCollator(tok, net)
    return [on_device(collate([data[i] for i in range(k*BATCH, (k+1)*BATCH)]), DEVICE)
            for k in range(min(n, len(data)//BATCH))]

def work(tok, data):
    "(multiplications and additions, tokens through the model, tokens when padded) of an average step"
    from torch.utils.flop_counter import FlopCounterMode
    from ftkit.objectives import OBJECTIVES
    from ftkit.reference import Reference
    net = adapted()
    dpo,some = OBJECTIVES['dpo'],batches(tok, data, net)
    top,began = dpo.head(net),Reference(net, 'adapter')
    with FlopCounterMode(display=False) as counter:
        for batch in some[:4]:
            began.fill(batch)
            dpo.loss(net, top, batch).losses.sum().backward()
    whole = [max(len(data[i]['prompt_ids']) + max(len(data[i]['chosen_ids']), len(data[i]['rejected_ids']))
                 for i in range(k*BATCH, (k+1)*BATCH))*2*BATCH for k in range(len(some))]
    tokens = sum(b['inputs']['input_ids'].numel() for b in some)
    return counter.get_total_flops()/4, tokens/len(some), sum(whole)/len(some)

def one(which, steps, folder):
    "Print a run's figures as JSON"
    from ftkit.train import train
    tok = tokenizer()
    data = pairs(tok)
    options = dict(per_device_train_batch_size=BATCH, learning_rate=1e-5, save_strategy='no', overwrite=True,
                   reference='adapter', engine=which, precision=PRECISION, out=f'{folder}/{which}')
    def timed(n):
        net,start = adapted(),time.perf_counter()
        return train(net, tok, data, 'dpo', max_steps=n, **options).log, time.perf_counter()-start
    first = timed(1)[0][0]['loss'] # warm
    one_step,(log,all_steps) = timed(1)[1],timed(steps+1)
    seconds = (all_steps-one_step)/steps # without what is done once
    print(json.dumps(dict(seconds=seconds, first=first, last=log[-2]['loss'], peak=peak())))

def main(steps=STEPS, rounds='2'):
    sides = dict(ftkit=[], trl=[])
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(int(rounds)):
            for which,runs in sides.items():
                out = subprocess.check_output([sys.executable, __file__, which, steps, folder], text=True)
                runs.append(json.loads(out.splitlines()[-1]))
    tok = tokenizer()
    (flops,tokens,padded),limit = work(tok, pairs(tok)),rate()
    best = {which: min(runs, key=lambda r: r['seconds']) for which,runs in sides.items()}
    for which,r in best.items():
        print(f"{which}: {BATCH/r['seconds']:.2f} pairs/s, peak {r['peak']/2**30:.2f} GiB, "
              f"{flops/r['seconds']/limit:.0%} of the matmul rate, loss {r['first']:.4f} to {r['last']:.4f}")
    ours,theirs = best['ftkit'],best['trl']
    faster,memory = theirs['seconds']/ours['seconds'],ours['peak']/theirs['peak']
    print(f"{faster:.2f} times TRL's pairs/s, {memory:.2f} of its memory; {tokens:,.0f} tokens a step instead of "
          f'{padded:,.0f}; {flops/1e12:.2f} TFLOP a step, {limit/1e9:.0f} GFLOP/s')
    keep('dpo', sides=sides, flops=flops, rate=limit, tokens=tokens, padded=padded, pairs=BATCH, data=DATA)

if __name__ == '__main__':
    if sys.argv[1:2] in (['ftkit'], ['trl']): one(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else: main(*sys.argv[1:])
