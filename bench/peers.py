"""Other calculators on the runs that others have measured, beside ours

    python bench/peers.py

The rows of bench/memory.py that the others know of (one GPU, transformers' loss, no experts), whose last figures for
`simulate` it takes from bench/results/memory.json. Each peer gets the closest settings that it accepts: `fitcheck-
llm` all of them; accelerate's and DeepSpeed's estimators know of no adapter, of no rows and of no logits, and get the
number of weights; so do the sixteen bytes a weight and the activations of Korthikanti et al. 2022, which are
EleutherAI's formula. fitcheck-llm and DeepSpeed's sources are fetched when they are first asked for (needs a package
index). Prints mean and worst errors, best first, kept in bench/results/peers.json.
"""
import os
os.environ |= dict(IN_TEST='1', HF_HUB_OFFLINE='1')
import ast, json, logging, subprocess, sys, tarfile
import memory as bench
from machine import RESULTS, keep

PEERS = bench.HERE.parent/'.venv-memory'
FITCHECK,DEEPSPEED = 'fitcheck-llm==0.3.1','deepspeed==0.17.5'

def fitcheck():
    "Its modules, which are formulae alone"
    made = PEERS/'fitcheck'
    if not made.exists(): subprocess.check_call(
        [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', str(made), FITCHECK])
    if str(made) not in sys.path: sys.path.append(str(made))
    import fitcheck.estimator as estimator, fitcheck.config_parser as parser, fitcheck.gpu_db as gpus
    return estimator, parser, gpus

def zero2():
    "DeepSpeed's function, out of its sources"
    found = [*PEERS.glob('deepspeed-*.tar.gz')]
    get = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', ':all:', '-d', str(PEERS)]
    if not found: subprocess.check_call([*get, DEEPSPEED])
    archive = next(PEERS.glob('deepspeed-*.tar.gz'))
    with tarfile.open(archive) as tar:
        name = next(n for n in tar.getnames() if n.endswith('runtime/zero/stage_1_and_2.py'))
        tree = ast.parse(tar.extractfile(name).read())
    wanted = [n for n in tree.body if getattr(n, 'name', '') == 'estimate_zero2_model_states_mem_needs']
    exec(compile(ast.Module(wanted, []), str(archive), 'exec'), space := {})
    return lambda n: space['estimate_zero2_model_states_mem_needs'](n, cpu_offload=False)[1]

def by_fitcheck(row, c, s):
    estimator,parser,gpus = fitcheck()
    raw = c.to_dict()
    fields = parser._parse_fields(raw)
    names = ('hidden_size', 'num_layers', 'num_attention_heads', 'num_kv_heads', 'intermediate_size', 'vocab_size',
             'head_dim', 'tie_word_embeddings')
    model = parser.ModelConfig(row['model'], parser._count_params(fields), *(getattr(fields, n) for n in names))
    full = s['method'] == 'full'
    own = {} if full else dict(lora_rank=s['lora']['r'], lora_targets=s['lora']['target_modules'])
    training = estimator.TrainingConfig(
        precision=s['dtype'], quantization='nf4' if s['method'] == 'qlora' else 'none', batch_size=s['batch'],
        double_quant=s.get('double_quant', True) and s['method'] == 'qlora', seq_len=s['length'],
        grad_checkpoint=bool(s['checkpointing']), flash_attn=s['attention'] == 'flash',
        optimizer_dtype='bf16' if full and s['dtype'] == 'bf16' else 'fp32', **(own or dict(lora_rank=None)))
    gpu = gpus.get_gpu('t4' if 'T4' in row['gpu'] else 'a100-80')
    report = estimator.estimate(model, training, gpu)
    return (report.total_mib - report.overhead_mib)*bench.MiB

def by_accelerate(row, c, s):
    from accelerate.commands.estimate import estimate_training_usage
    return max(estimate_training_usage(4*weights(c), dict(fp16='float16', bf16='bfloat16')[s['dtype']]).values())

def by_deepspeed(row, c, s): return zero2()(weights(c))

def by_eleuther(row, c, s):
    h,heads,tokens = c.hidden_size,c.num_attention_heads,s['batch']*s['length']
    kept = tokens*h*(2 if s['checkpointing'] else 34 + 5*heads*s['length']/h)
    return 16*weights(c) + kept*c.num_hidden_layers

def by_estimate(row, c, s):
    from ftkit.memory import estimate
    return estimate(c, **s).allocated

def weights(c):
    from ftkit.memory import parts
    return sum(p.size for p in parts(c))

def rows():
    own = lambda r: r['n_gpus'] == '1' and 'foak' not in r['loss_impl']
    return [r for r in bench.rows() if own(r) and not any(x in r['arch_LHnhkvff_vocab'] for x in ('MQA', 'x8e'))]

def settings(row):
    "Those of `estimate`, which takes no dropout and only the newer kind of checkpointing"
    s = {k: v for k,v in bench.options(row).items() if k not in ('gpus', 'sharding', 'prepare')}
    s['checkpointing'] = bool(s['checkpointing'])
    return s | dict(lora={k: v for k,v in s['lora'].items() if k != 'lora_dropout'}) if s['lora'] else s

def main():
    ways = {'ftkit.memory.estimate': by_estimate, 'fitcheck-llm 0.3.1': by_fitcheck,
            "accelerate's training": by_accelerate, "DeepSpeed's ZeRO-2": by_deepspeed, 'EleutherAI': by_eleuther}
    traced = {r['id']: r['allocated'] for r in json.loads((RESULTS/'memory.json').read_text())['runs']}
    found = {'ftkit.simulate': {}} | {name: {} for name in ways}
    for row in rows():
        c,s,there = bench.config(row),settings(row),float(row['peak_mib'])*bench.MiB
        found['ftkit.simulate'][row['id']] = traced[row['id']]
        for name,way in ways.items(): found[name][row['id']] = way(row, c, s)/there - 1
    sizes = {name: [*map(abs, errors.values())] for name,errors in found.items()}
    for name,e in sorted(sizes.items(), key=lambda x: sum(x[1])/len(x[1])):
        print(f'{name:24} mean {sum(e)/len(e):8.2%}  worst {max(e):8.2%}  ({len(e)} runs)')
    peers = [e for name,e in sizes.items() if not name.startswith('ftkit')]
    best = min(sum(e)/len(e) for e in peers)
    print('our worst is smaller than the best mean of the others:', max(sizes['ftkit.simulate']) < best)
    keep('peers', errors=found)

if __name__ == '__main__':
    logging.disable(logging.WARNING)
    main()
