"""Packing: seconds for a million lengths, rows over the least possible number, and both against TRL's `pack_dataset`

    python bench/pack.py [MILLIONS of lengths]

Lengths are drawn from a log-normal fitted to no data set in particular and from the lengths of real conversations.
The best of five counts; `pack_dataset` is measured in fresh processes, in turns. Just before each run a
gigabyte is written and thrown away, so that memory is at hand: a virtual machine that has to fetch it from its host
spends up to 0.7 s of system time on it, whoever asks first. Prints one line per figure, kept in
bench/results/pack.json.
"""
import os
os.environ |= dict(TOKENIZERS_PARALLELISM='false', OMP_NUM_THREADS='1', HF_DATASETS_DISABLE_PROGRESS_BARS='1')
import subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
from machine import DATA, keep
from ftkit.lengths import from_arrays, profile_lengths
from ftkit.pack import pack, pack_dataset

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1]/'shared'/'data'

def timed(f):
    start = time.perf_counter()
    out = f()
    return time.perf_counter()-start, out

def real_lengths():
    "Tokens of the conversations of the shared data sets; tasks of ftkit's own where there are none"
    from transformers import AutoTokenizer
    from ftkit.chat import set_template
    from ftkit.formats import load
    from ftkit.mask import encode_dataset
    from ftkit.models import load_tokenizer
    if not SHARED.is_dir(): return profile_lengths(encode_dataset(load_tokenizer('embedded'), load('tasks'))).tokens
    tok = AutoTokenizer.from_pretrained(SHARED/'tokenizers'/'smollm2')
    set_template(tok)
    files = 'alpaca_5000.part.jsonl', 'alpaca_gpt4_en_demo.jsonl', 'sharegpt_fastchat_dummy.jsonl', 'text_c4.jsonl'
    return np.concatenate([profile_lengths(encode_dataset(tok, load(SHARED/'datasets'/f))).tokens for f in files])

def random_rows(lengths):
    "A data set of random tokens with these lengths"
    ids = np.random.default_rng(1).integers(0, 50_000, lengths.sum(), dtype=np.int32)
    return from_arrays([(dict(input_ids=ids, labels=ids), lengths)])

def measure(which, folder):
    "Print seconds and rows of one run"
    from datasets import load_from_disk
    from trl import pack_dataset as trl_pack
    ds = load_from_disk(folder)
    with tempfile.TemporaryDirectory() as out:
        fresh = dict(load_from_cache_file=False, cache_file_name=f'{out}/packed.arrow')
        with tempfile.TemporaryFile() as f: f.writelines(bytes(2**20) for _ in range(1024))
        os.sync()
        run = dict(ftkit=lambda: pack_dataset(ds, 2048), trl=lambda: trl_pack(ds, 2048, map_kwargs=fresh))
        seconds,packed = timed(run[which])
        assert profile_lengths(packed).tokens.sum() == profile_lengths(ds).tokens.sum()
        print(seconds, len(packed))

def fresh(which, folder):
    "Seconds and rows of one run in a process of its own"
    seconds,rows = subprocess.check_output([sys.executable, __file__, which, folder], text=True).split()[-2:]
    return float(seconds), int(rows)

def main(millions='1'):
    rng,n,real = np.random.default_rng(0),int(float(millions)*1e6),real_lengths()
    kinds = dict(lognormal=np.clip(rng.lognormal(5.5, .9, n).astype(int), 8, 4096), real=rng.choice(real, n))
    figures = dict(lengths=n, pack=[])
    for kind,drawn in kinds.items():
        for max_length in (1024, 2048, 4096):
            lengths = np.minimum(drawn, max_length)
            seconds,found = min((timed(lambda: pack(lengths, max_length)) for _ in range(5)), key=lambda r: r[0])
            over = len(found)/np.ceil(lengths.sum()/max_length) - 1
            figures['pack'].append(dict(kind=kind, max_length=max_length, seconds=seconds, rows=len(found), over=over))
            print(f'pack {n:,} {kind} lengths into rows of {max_length}: {seconds:.2f} s, {len(found):,} rows, '
                  f'{over:.3%} over the least')
    figures['pack_dataset'] = []
    drawn = {f'{mean} or so': rng.lognormal(np.log(mean*.7), .9, int(share*n)) # the more tokens, the more is copying
             for share,mean in ((1, 10), (.3, 60), (.1, 335))} | {'real': kinds['real'][:int(.3*n)]}
    for kind,lengths in drawn.items():
        lengths = np.clip(lengths.astype(int), 1, 2048)
        with tempfile.TemporaryDirectory() as folder:
            random_rows(lengths).save_to_disk(folder)
            runs = [(fresh('ftkit', folder), fresh('trl', folder)) for _ in range(5)]
        (ours,rows),(theirs,trl_rows) = map(min, zip(*runs))
        figures['pack_dataset'].append(
            dict(kind=kind, rows=len(lengths), mean=lengths.mean(), times=theirs/ours, runs=runs))
        print(f'pack_dataset {len(lengths):,} rows of {lengths.mean():.0f} tokens ({kind}) into 2048: '
              f'ftkit {ours:.2f} s, {rows:,} rows; TRL {theirs:.2f} s, {trl_rows:,} rows: '
              f'{theirs/ours:.1f} times as fast')
    keep('pack', **figures, data=DATA)

if __name__ == '__main__': (measure if sys.argv[1:2] in (['ftkit'], ['trl']) else main)(*sys.argv[1:])
