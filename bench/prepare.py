"""Rows per second from conversations to masked ids: the tokenizer alone (the limit), ftkit, and TRL's own preparation

    python bench/prepare.py [FOLDER of JSON Lines] [TOKENIZER] [ROWS]

The limit is the tokenizer's `encode_batch` on texts that are rendered already. All three use the same number of
processes, with one thread each, and ftkit and TRL must give the same ids and labels. Memory is measured in a process
of its own, for two sizes. Prints one line per figure, kept in bench/results/prepare.json.
"""
import os, sys
os.environ |= dict(TOKENIZERS_PARALLELISM='false', OMP_NUM_THREADS='1', HF_DATASETS_DISABLE_PROGRESS_BARS='1')
import resource, subprocess, time
from multiprocessing import get_context
from pathlib import Path
from datasets import concatenate_datasets
from machine import DATA, keep
from transformers import AutoTokenizer
from ftkit.chat import render, set_template
from ftkit.formats import as_dataset, load
from ftkit.mask import encode_dataset

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1]/'shared'/'data'
FILES = 'alpaca_5000.part.jsonl', 'alpaca_gpt4_en_demo.jsonl', 'sharegpt_fastchat_dummy.jsonl'

def conversations(folder, n):
    "`n` rows of real conversations, repeated where there are not enough"
    rows = [dict(messages=[dict(role=m['role'], content=m['content']) for m in r['messages']])
            for f in FILES for r in load(Path(folder)/f)]
    return as_dataset(rows[i % len(rows)] for i in range(n))

def tokenizer(name):
    tok = AutoTokenizer.from_pretrained(name)
    set_template(tok)
    tok.backend_tokenizer.no_truncation()
    return tok

def encode_part(texts):
    for i in range(0, len(texts), 1000): CORE.encode_batch(texts[i:i+1000], add_special_tokens=False)

def limit(texts, processes):
    if processes == 1: return timed(lambda: encode_part(texts))[0]
    with get_context('fork').Pool(processes) as pool:
        pool.map(encode_part, [texts[:10]]*processes) # the processes are there
        return timed(lambda: pool.map(encode_part, [texts[k::processes] for k in range(processes)], chunksize=1))[0]

def timed(f):
    start = time.perf_counter()
    out = f()
    return time.perf_counter()-start, out

def fresh(ds, k):
    "The same rows under another name, so that no cache answers"
    ds = concatenate_datasets([ds])
    ds._fingerprint = f'{os.getpid()}-{k}'
    return ds

def trl_preparation(tok, ds, processes):
    "TRL's preparation of rows, apart from the trainer that it is a method of"
    from trl import SFTConfig, SFTTrainer
    from ftkit.tiny import tiny
    config = SFTConfig(output_dir='/tmp/trl', max_length=None, packing=False, assistant_only_loss=True, bf16=False,
                       use_cpu=True, report_to='none', dataset_num_proc=processes if processes > 1 else None,
                       gradient_checkpointing=False)
    trainer = SFTTrainer(tiny()[1], config, train_dataset=ds.select(range(2)), processing_class=tok)
    return timed(lambda: trainer._prepare_dataset(ds, tok, config, False, None, 'bench'))

def peak_memory(folder, name, n):
    "MB that a process of its own holds at most while it encodes `n` rows that lie on disk"
    command = [sys.executable, __file__, '--memory', folder, name, str(n)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])

def main(folder=str(SHARED/'datasets'), name=str(SHARED/'tokenizers'/'smollm2'), n='20000'):
    global CORE
    n,tok = int(n),tokenizer(name)
    CORE,ds = tok.backend_tokenizer,conversations(folder, n)
    texts = [render(tok, r['messages']) for r in ds]
    encode_dataset(tok, ds.select(range(100)))
    figures = dict(rows=n, tokenizer=Path(name).name)
    for p in (1, 2):
        rounds = [(limit(texts, p), *timed(lambda: encode_dataset(tok, fresh(ds, f'{p}{k}'), num_proc=p)),
                   *trl_preparation(tok, fresh(ds, f't{p}{k}'), p)) for k in range(3)]
        top,ours,trl = (min(r[i] for r in rounds) for i in (0, 1, 3))
        _,_,mine,_,theirs = rounds[0]
        same = all(a['input_ids'] == b['input_ids'] and a['labels'] == b['labels'] for a,b in zip(mine, theirs))
        figures[f'{p} processes'] = dict(limit=n/top, ftkit=n/ours, trl=n/trl, of_limit=top/ours, times_trl=trl/ours,
                                         same=same)
        print(f'{p} process(es): limit {n/top:,.0f} rows/s, ftkit {n/ours:,.0f} ({top/ours:.0%} of it), '
              f'TRL {n/trl:,.0f} '
              f'(ftkit is {trl/ours:.1f} times as fast), same ids and labels: {same}')
    figures['memory'] = {rows: peak_memory(folder, name, rows) for rows in (n, 4*n)}
    print('most memory in MB by rows:', *(f'{rows:,}: {mb:,.0f}' for rows,mb in figures['memory'].items()))
    keep('prepare', **figures, data=DATA)

if __name__ == '__main__':
    if sys.argv[1:2] == ['--memory']:
        folder,name,n = sys.argv[2:]
        encode_dataset(tokenizer(name), conversations(folder, int(n)))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)
    else: main(*sys.argv[1:])
