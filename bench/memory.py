"""Predicted memory beside memory that others have measured on GPUs

    python bench/memory.py [ID ...]

Every row of `measured_memory.csv` that was measured to a tenth of a MiB: what was the most allocated and reserved
there, and what `simulate` says, which has seen no GPU. Rows of the T4 were measured with libraries near ours; for
those of the A100 the versions they were measured with are put into a folder of their own first, with the kernels that
some of them use (needs a package index and 1.5 GB); that GPT-BigCode kept its cache is inferred from what it took. A
quarter of an hour. Prints a line for each row, and mean and
worst errors, kept in bench/results/memory.json, and the table of measured.csv.
"""
import os
os.environ |= dict(IN_TEST='1', HF_HUB_OFFLINE='1')
import csv, json, logging, re, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEASURED = HERE.parents[1]/'shared'/'reference'/'measured_memory.csv'
MiB = 2**20
# where runs on A100s were listed -> versions they were made with, of transformers, tokenizers, PEFT, and fused kernels
OLD = dict(a100_80gb=('4.48.1', '0.21.4', '0.13.2', '0.6.0'), a100_80gb_granite=('4.45.2', '0.20.3', '0.12.0', '0.3.3'),
           a100_80gb_liger=('4.45.2', '0.20.3', '0.13.2', '0.4.0'))
NEEDED = ('transformers=={}', 'tokenizers=={}', 'peft=={}', 'fms-acceleration-foak=={}', 'fms-acceleration==0.6.4',
          'huggingface-hub==0.36.0', 'triton==3.0.0')

def config(row):
    "The shape of a row's model"
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    words,name = row['arch_LHnhkvff_vocab'],row['model'].lower()
    layers,hidden,heads,kv,mlp = words.split()[0].replace('x8e(top2)', '').replace('MQA', '').split('/')
    layers,hidden,heads,kv,mlp,vocab = map(int, (layers, hidden, heads, kv, mlp, re.search(r'v(\d+)', words)[1]))
    if 'santacoder' in name: return CONFIG_MAPPING['gpt_bigcode'](
        n_layer=layers, n_embd=hidden, n_head=heads, n_inner=mlp, vocab_size=vocab, n_positions=2048)
    kinds = dict(qwen2='qwen2', mistral='mistral', mixtral='mixtral', powerlm='granite')
    kind = next((k for word,k in kinds.items() if word in name), 'llama')
    return CONFIG_MAPPING[kind](num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
        num_key_value_heads=kv, intermediate_size=mlp, vocab_size=vocab, max_position_embeddings=32768,
        tie_word_embeddings='tied' in words or kind == 'granite', sliding_window=None)

def fused(model, row):
    "With the kernels of fms-acceleration, as its plugin for a row puts them in"
    from fms_acceleration.model_patcher import ModelPatcher
    from fms_acceleration_foak import framework_plugin_fast_kernels as plugin
    four = row['method'] == 'QLoRA'
    names = {'rms', 'rope', *(('fused-lce',) if 'liger' in row['loss_impl'] else ('cross-ent', 'custom-loss')),
             *(('qkvo', 'mlp') if four else ())}
    new = getattr(plugin, 'register_foak_model_patch_rules', None)
    if new: new('bitsandbytes', names, model.config)
    else: plugin.register_foak_model_patch_rules2('bitsandbytes', names)
    ModelPatcher.patch(model)
    if four: without_bitsandbytes(model)
    return model

def without_bitsandbytes(model):
    "Its kernels, called by address, do nothing; adapters are left whole by FSDP, whose hooks fused layers do not run"
    from fms_acceleration_foak.fused_ops.unsloth_lora import utils
    from peft.tuners.lora.layer import LoraLayer
    from torch.distributed import fsdp
    for name in dir(utils):
        if name.startswith(('cdequantize', 'cgemm')): setattr(utils, name, lambda *_: None)
    utils.get_ptr = lambda _: None
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    beside = [part for layer in layers for part in (layer.lora_A, layer.lora_B)]
    class Some(fsdp.FullyShardedDataParallel):
        def __init__(self, module, **kwargs): super().__init__(module, **dict(ignored_modules=beside) | kwargs)
    fsdp.FullyShardedDataParallel = Some

def caching(model):
    "GPT-BigCode keeps its keys and values while it trains, if nobody tells it not to"
    model.config.use_cache = True
    return model

def options(row):
    "The options of `simulate` for a row"
    t4,four = 'T4' in row['gpu'],row['method'] == 'QLoRA'
    where = dict(dtype='fp16', attention='eager' if row['attn_impl'] == 'eager' else 'efficient', checkpointing=True,
                 loss='kept', upcast=four, double_quant=False) if t4 else \
            dict(dtype='bf16', attention='flash', checkpointing='reentrant', loss='plain',
                 autocast='bf16' if row['autocast'] == 'bf16' else None, gpus=int(row['n_gpus']), sharding='fsdp1')
    if 'foak' in row['loss_impl']: where['prepare'] = lambda model: fused(model, row)
    if 'santacoder' in row['model']: where['prepare'] = caching
    lora = dict(r=int(float(row['lora_r'])), lora_dropout=0. if t4 else .1,
                target_modules=[f'{n}_proj' for n in row['lora_targets'].split(',')]) if row['lora_r'] else None
    return where | dict(method=row['method'].lower(), length=int(row['seq_len']), batch=int(row['micro_batch']),
                        optim='adamw_torch', lora=lora)

def rows():
    "Those whose conditions are known: not LLaMA-Factory's, rounded to a GiB"
    with MEASURED.open() as f: return [r for r in csv.DictReader(f) if not r['id'].startswith('lmf')]

def place(row): return next((name for name in OLD if row['source_url'].endswith(f'/{name}.csv')), None)

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

def folder(name):
    "With the libraries of another time; made when it is first asked for"
    made = HERE.parent/f'.venv-memory/{name}'
    if not made.exists(): subprocess.check_call([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target',
        str(made), *(need.format(v) for need,v in zip(NEEDED, [*OLD[name], '', '', '']))])
    return str(made)

def asked(row):
    "What `one` says, in a process of its own"
    name = place(row)
    path = [*([folder(name)] if name else []), str(HERE.parent)]
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(path), OMP_NUM_THREADS='1')
    said = subprocess.check_output([sys.executable, '-W', 'ignore', __file__, 'one', row['id']], text=True, env=env,
                                   stderr=subprocess.DEVNULL)
    return json.loads(said.splitlines()[-1])

def table(out):
    "What was measured, under which conditions and by whom, and what is predicted: measured.csv"
    found,names = {x['id']: x for x in out},dict(
        id='id', model='model', shape='arch_LHnhkvff_vocab', method='method', length='seq_len', batch='micro_batch',
        checkpointing='grad_ckpt', attention='attn_impl', loss='loss_impl', gpus='n_gpus', sharding='sharding',
        gpu='gpu', allocated_mib='peak_mib', reserved_mib='peak_reserved_or_smi_mib', versions='versions',
        source='source_url')
    with (HERE/'measured.csv').open('w', newline='') as f:
        w = csv.writer(f)
        w.writerow([*names, 'predicted_mib'])
        for row in rows(): w.writerow([*(row[c] for c in names.values()), round(found[row['id']]['mib'], 3)])

def said(row, found):
    gpus = row['gpu'] if row['n_gpus'] == '1' else f"{row['n_gpus']} {row['gpu']}"
    kind = [gpus, row['method'], row['attn_impl'].split()[0], *(['fused'] if 'foak' in row['loss_impl'] else []),
            f"{row['micro_batch']}x{row['seq_len']}"]
    more = f", reserved {found['reserved']:+.2%}" if 'reserved' in found else ''
    return f"{row['id']} {row['model']}, {', '.join(kind)}: {found['mib']:,.0f} MiB, {found['allocated']:+.3%}{more}"

def summed(out, name, kind):
    sizes = [abs(x[name]) for x in out if name in x]
    n = len(sizes)
    if sizes: print(f'{kind}, {name}: {n} runs, mean error {sum(sizes)/n:.2%}, worst {max(sizes):.2%}')

def main(*only):
    some,out = [r for r in rows() if not only or r['id'] in only],[]
    for name in filter(None, dict.fromkeys(map(place, some))): folder(name)
    with ThreadPoolExecutor(2) as pool:
        for row,found in zip(some, pool.map(asked, some)):
            out.append(found)
            print(said(row, found), flush=True)
    for gpu in dict.fromkeys(x['gpu'] for x in out):
        for name in ('allocated', 'reserved'): summed([x for x in out if x['gpu'] == gpu], name, gpu)
    if only: return
    from machine import keep
    keep('memory', runs=out)
    table(out)

if __name__ == '__main__':
    logging.getLogger('bitsandbytes').setLevel(logging.ERROR)
    if sys.argv[1:2] == ['one']: one(next(r for r in rows() if r['id'] == sys.argv[2]))
    else: main(*sys.argv[1:])
