"""Four bits: seconds to quantise and dequantise 100 million weights, beside bitsandbytes on the CPU

    python bench/nf4.py [MILLIONS of weights] [THREADS]

In turns, the best of five. Prints one line per figure, kept in bench/results/nf4.json.
"""
import os, sys, time
os.environ['OMP_NUM_THREADS'] = sys.argv[2] if sys.argv[2:] else '1' # bitsandbytes has threads of its own
import torch
import bitsandbytes.functional as BF
from machine import keep
from ftkit.nf4 import dequantize, quantize

def best(runs): return [min(times) for times in zip(*runs)]

def timed(f):
    start = time.perf_counter()
    f()
    return time.perf_counter()-start

def main(millions='100', threads='1'):
    torch.set_num_threads(int(threads))
    weight = torch.randn(int(float(millions)*1000), 1024, generator=torch.Generator().manual_seed(0))*.02
    figures = []
    for dtype in (torch.float32, torch.bfloat16):
        w = weight.to(dtype)
        ours,(theirs,state) = quantize(w, double=True),BF.quantize_4bit(w, quant_type='nf4', compress_statistics=True)
        assert torch.equal(ours.codes, theirs.flatten())
        assert torch.equal(dequantize(ours), BF.dequantize_4bit(theirs, state))
        jobs = dict(quantize=(lambda: quantize(w, double=True),
                              lambda: BF.quantize_4bit(w, quant_type='nf4', compress_statistics=True)),
                    dequantize=(lambda: dequantize(ours), lambda: BF.dequantize_4bit(theirs, state)))
        for name,pair in jobs.items():
            a,b = best([[timed(f) for f in pair] for _ in range(5)])
            figures.append(dict(what=name, dtype=str(dtype), threads=int(threads), ftkit=a, bitsandbytes=b, times=b/a))
            print(f'{name} {w.numel()/1e6:.0f} M weights of {str(dtype)[6:]}, {threads} threads: ftkit {a:.2f} s, '
                  f'bitsandbytes {b:.2f} s: {b/a:.2f} times as fast')
    keep('nf4', weights=weight.numel(), runs=figures)

if __name__ == '__main__': main(*sys.argv[1:])
