"""Predicted memory beside memory that others have measured on GPUs

    python bench/memory.py [ID ...]

Rows of `measured_memory.csv` on one GPU whose loss is transformers': what was the most allocated and reserved there,
and what `simulate` says, which has seen no GPU. Rows of the T4 were measured with libraries near ours; for those of the
A100 the versions they were measured with are put into a folder of their own first (needs a package index). Three
minutes. Prints a line for each row, and mean and worst errors, kept in bench/results/memory.json.
"""
import os
os.environ |= dict(IN_TEST='1', HF_HUB_OFFLINE='1')
import csv, json, logging, re, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEASURED = HERE.parents[1]/'shared'/'reference'/'measured_memory.csv'
MiB = 2**20
OLD = {'4.45.2': ['tokenizers==0.20.3'], '4.48.1': ['tokenizers==0.21.4']} # versions of transformers, what they need
OLD = {v: [f'transformers=={v}', 'peft==0.13.2', 'huggingface-hub==0.36.0', *more] for v,more in OLD.items()}

def config(row):
    "The shape of a row's model"
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    shape,words = row['arch_LHnhkvff_vocab'].split()[0].split('/'),row['arch_LHnhkvff_vocab']
    layers,hidden,heads,kv,mlp = map(int, shape)
    kind = next((k for name,k in (('Qwen2', 'qwen2'), ('Mistral', 'mistral'), ('PowerLM', 'granite'))
                 if name in row['model']), 'llama')
    return CONFIG_MAPPING[kind](num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
        num_key_value_heads=kv, intermediate_size=mlp, vocab_size=int(re.search(r'v(\d+)', words)[1]),
        tie_word_embeddings='tied' in words or kind == 'granite', max_position_embeddings=32768, sliding_window=None)

def options(row):
    "The options of `simulate` for a row"
    t4,four = 'T4' in row['gpu'],row['method'] == 'QLoRA'
    where = dict(dtype='fp16', attention='eager' if row['attn_impl'] == 'eager' else 'efficient', checkpointing=True,
                 loss='kept', upcast=four, double_quant=False) if t4 else \
            dict(dtype='bf16', attention='flash', checkpointing='reentrant', loss='plain',
                 autocast='bf16' if row['autocast'] == 'bf16' else None)
    lora = dict(r=int(float(row['lora_r'])), lora_dropout=0. if t4 else .1,
                target_modules=[f'{n}_proj' for n in row['lora_targets'].split(',')]) if row['lora_r'] else None
    return where | dict(method=row['method'].lower(), length=int(row['seq_len']), batch=int(row['micro_batch']),
                        optim='adamw_torch', lora=lora)

def rows():
    "Those whose conditions are known: no mixture of experts, no kernels that nobody can see into"
    with MEASURED.open() as f: found = [r for r in csv.DictReader(f) if r['n_gpus'] == '1']
    known = lambda shape: '/MQA' not in shape and 'x8e' not in shape
    return [r for r in found if r['loss_impl'].startswith('HF ForCausalLMLoss') and known(r['arch_LHnhkvff_vocab'])]

def version(row): return next((v for v in OLD if f'transformers {v};' in row['versions']), None)

def one(row):
    "Print a row's errors as JSON"
    from ftkit.simulate import simulate
    start = time.time()
    found = simulate(config(row), **options(row))
    allocated,reserved = (x/MiB/float(row[c])-1 for x,c in (
        (found.allocated, 'peak_mib'), (found.reserved, 'peak_reserved_or_smi_mib')))
    # what nvidia-smi says has the context in it, which nobody measured
    print(json.dumps(dict(id=row['id'], gpu=row['gpu'], allocated=allocated, mib=found.allocated/MiB,
                          seconds=time.time()-start) | (dict(reserved=reserved) if 'T4' in row['gpu'] else {})))

def folder(v):
    "With the libraries of another time; made when it is first asked for"
    made = HERE.parent/f'.venv-memory/{v}'
    if not made.exists(): subprocess.check_call([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target',
                                                 str(made), *OLD[v]])
    return str(made)

def table(out):
    "What was measured, under which conditions and by whom, and what is predicted: measured.csv"
    found,names = {x['id']: x for x in out},dict(
        id='id', model='model', shape='arch_LHnhkvff_vocab', method='method', length='seq_len', batch='micro_batch',
        checkpointing='grad_ckpt', attention='attn_impl', gpu='gpu', allocated_mib='peak_mib',
        reserved_mib='peak_reserved_or_smi_mib', versions='versions', source='source_url')
    with (HERE/'measured.csv').open('w', newline='') as f:
        w = csv.writer(f)
        w.writerow([*names, 'predicted_mib'])
        for row in rows(): w.writerow([*(row[c] for c in names.values()), round(found[row['id']]['mib'], 1)])

def main(*only):
    out = []
    for row in rows():
        if only and row['id'] not in only: continue
        path = [str(HERE.parent), *([folder(v)] if (v := version(row)) else [])][::-1]
        env = os.environ | dict(PYTHONPATH=os.pathsep.join(path), OMP_NUM_THREADS='1')
        said = subprocess.check_output([sys.executable, '-W', 'ignore', __file__, 'one', row['id']], text=True, env=env,
                                       stderr=subprocess.DEVNULL)
        out.append(found := json.loads(said.splitlines()[-1]))
        print(f"{row['id']} {row['model']}, {row['gpu']}, {row['method']}, {row['attn_impl'].split()[0]}, "
              f"{row['micro_batch']}x{row['seq_len']}: {found['mib']:,.0f} MiB, {found['allocated']:+.2%}" +
              (f", reserved {found['reserved']:+.2%}" if 'reserved' in found else '') +
              f", {found['seconds']:.0f} s", flush=True)
    for gpu in dict.fromkeys(x['gpu'] for x in out):
        for name in ('allocated', 'reserved'):
            sizes = [abs(x[name]) for x in out if x['gpu'] == gpu and name in x]
            if sizes: print(f'{gpu}, {name}: {len(sizes)} runs, mean error {sum(sizes)/len(sizes):.2%}, '
                            f'worst {max(sizes):.2%}')
    if only: return
    from machine import keep
    keep('memory', runs=out)
    table(out)

if __name__ == '__main__':
    logging.getLogger('bitsandbytes').setLevel(logging.ERROR)
    if sys.argv[1:2] == ['one']: one(next(r for r in rows() if r['id'] == sys.argv[2]))
    else: main(*sys.argv[1:])
