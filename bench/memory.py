"""Predicted memory beside memory that others have measured on GPUs

    python bench/memory.py [ID ...]

Rows of `measured_memory.csv` that were measured with libraries near ours (T4, transformers 5): what was the most
allocated and reserved there, and what `simulate` says, which has seen no GPU. A minute and a half. Prints a line for
each row, and the mean and the worst error; writes bench/memory.json.
"""
import os
os.environ |= dict(IN_TEST='1', HF_HUB_OFFLINE='1')
import csv, json, logging, re, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEASURED = HERE.parents[1]/'shared'/'reference'/'measured_memory.csv'
MiB = 2**20

def config(row):
    "The shape of a row's model"
    from transformers import AutoConfig
    shape,words = row['arch_LHnhkvff_vocab'].split()[0].split('/'),row['arch_LHnhkvff_vocab']
    layers,hidden,heads,kv,mlp = map(int, shape)
    kind = next((k for k in ('qwen2', 'mistral') if k[:4] in row['model'].lower()), 'llama')
    return AutoConfig.for_model(kind, num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
        num_key_value_heads=kv, intermediate_size=mlp, vocab_size=int(re.search(r'v(\d+)', words)[1]),
        tie_word_embeddings='tied' in words, max_position_embeddings=32768, sliding_window=None)

def options(row):
    "The options of `simulate` for a row of a T4"
    four = row['method'] == 'QLoRA'
    return dict(method=row['method'].lower(), length=int(row['seq_len']), batch=int(row['micro_batch']), dtype='fp16',
        attention='eager' if row['attn_impl'] == 'eager' else 'efficient', checkpointing=True, optim='adamw_torch',
        loss='kept', upcast=four, double_quant=False,
        lora=dict(r=int(float(row['lora_r'])), target_modules=[f'{n}_proj' for n in row['lora_targets'].split(',')]))

def rows(gpu='T4'):
    with MEASURED.open() as f: return [r for r in csv.DictReader(f) if gpu in r['gpu']]

def errors(row):
    "(simulation, error of what was allocated, of what was reserved)"
    from ftkit.simulate import simulate
    found = simulate(config(row), **options(row))
    measured = float(row['peak_mib']),float(row['peak_reserved_or_smi_mib'])
    return found, found.allocated/MiB/measured[0]-1, found.reserved/MiB/measured[1]-1

def main(*only):
    logging.getLogger('bitsandbytes').setLevel(logging.ERROR)
    out = []
    for row in rows():
        if only and row['id'] not in only: continue
        start = time.time()
        found,a,r = errors(row)
        out.append(dict(id=row['id'], allocated=a, reserved=r))
        print(f"{row['id']} {row['model']}, {row['method']}, {row['attn_impl'].split()[0]}, {row['seq_len']}: "
              f'allocated {found.allocated/MiB:,.0f} MiB ({a:+.2%}), reserved {found.reserved/MiB:,.0f} ({r:+.2%}), '
              f'{time.time()-start:.0f} s', flush=True)
    for name in ('allocated', 'reserved'):
        sizes = [abs(x[name]) for x in out]
        print(f'{name}: mean error {sum(sizes)/len(sizes):.2%}, worst {max(sizes):.2%}')
    (HERE/'memory.json').write_text(json.dumps(out, indent=1))

if __name__ == '__main__': main(*sys.argv[1:])
