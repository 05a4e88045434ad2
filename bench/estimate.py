"""The closed form against the trace: `python bench/estimate.py [N] [processes]`, one row each in bench/estimate.csv

With N=0 only the closed form is computed again, against what has been traced."""
import csv, random, sys, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
# hidden size, layers, heads, heads of keys, width of a head, MLP, vocabulary, tied, anything else
MODELS = {
    'SmolLM2-135M': ('llama', 576, 30, 9, 3, 64, 1536, 49152, True, {}),
    'Llama-3.2-1B': ('llama', 2048, 16, 32, 8, 64, 8192, 128256, True, {}),
    'Llama-3.2-3B': ('llama', 3072, 28, 24, 8, 128, 8192, 128256, True, {}),
    'Llama-2-7B': ('llama', 4096, 32, 32, 32, 128, 11008, 32000, False, {}),
    'Llama-3.1-8B': ('llama', 4096, 32, 32, 8, 128, 14336, 128256, False, {}),
    'Llama-3.1-70B': ('llama', 8192, 80, 64, 8, 128, 28672, 128256, False, {}),
    'Qwen2.5-0.5B': ('qwen2', 896, 24, 14, 2, 64, 4864, 151936, True, {}),
    'Qwen2.5-3B': ('qwen2', 2048, 36, 16, 2, 128, 11008, 151936, True, {}),
    'Qwen2.5-7B': ('qwen2', 3584, 28, 28, 4, 128, 18944, 152064, False, {}),
    'Qwen3-0.6B': ('qwen3', 1024, 28, 16, 8, 128, 3072, 151936, True, {}),
    'Qwen3-8B': ('qwen3', 4096, 36, 32, 8, 128, 12288, 151936, False, {}),
    'Mistral-7B': ('mistral', 4096, 32, 32, 8, 128, 14336, 32768, False, dict(sliding_window=None)),
    'Mistral-7B-v0.1': ('mistral', 4096, 32, 32, 8, 128, 14336, 32000, False, dict(sliding_window=4096)),
    'gemma-2b': ('gemma', 2048, 18, 8, 1, 256, 16384, 256000, True, {}),
    'gemma-2-2b': ('gemma2', 2304, 26, 8, 4, 256, 9216, 256000, True, {}),
    'gemma-3-1b': ('gemma3_text', 1152, 26, 4, 1, 256, 6912, 262144, True, dict(sliding_window=512)),
    'Phi-3-mini': ('phi3', 3072, 32, 32, 32, 96, 8192, 32064, False, dict(pad_token_id=0, sliding_window=2047)),
    'SmolLM3-3B': ('smollm3', 2048, 36, 16, 4, 128, 11008, 128256, True, {}),
    'OLMo-2-1B': ('olmo2', 2048, 16, 16, 16, 128, 8192, 100352, False, {}),
    'Granite-3-2B': ('granite', 2048, 40, 32, 8, 64, 8192, 49155, True, {}),
    'Qwen3-30B-A3B': ('qwen3_moe', 2048, 48, 32, 4, 128, 6144, 151936, False, dict(
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, decoder_sparse_step=1)),
    'Mixtral-8x7B': ('mixtral', 4096, 32, 32, 8, 128, 14336, 32000, False, dict(
        num_local_experts=8, num_experts_per_tok=2))}

def model(name):
    "A config of transformers"
    from transformers import AutoConfig
    kind,hidden,layers,heads,kv,wide,mlp,vocab,tied,more = MODELS[name]
    return AutoConfig.for_model(
        kind, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, head_dim=wide,
        num_key_value_heads=kv, intermediate_size=mlp, vocab_size=vocab, tie_word_embeddings=tied, **more)

LENGTHS = 512, 1024, 2048, 4096, 8192, 16384, 32768
OPTIMS = 'adamw_torch', 'adamw_torch_fused', 'adamw_8bit', 'paged_adamw_8bit', 'adafactor'

def drawn(n, seed=0):
    "Settings by chance, always the same ones"
    random.seed(seed)
    pick = random.choice
    for k in range(n):
        name = [*MODELS][k % len(MODELS)]
        moe = MODELS[name][0] in ('mixtral', 'qwen3_moe')
        s = dict(method=pick(('full', 'lora') if moe else ('full', 'lora', 'lora', 'qlora', 'qlora')),
                 attention=pick(('sdpa', 'sdpa', 'flash', 'flash', 'efficient', 'eager')),
                 checkpointing=pick((True, False)),
                 dtype='bf16' if moe else pick(('bf16', 'bf16', 'bf16', 'fp16', 'fp32')),
                 objective=pick(('sft', 'sft', 'sft', 'dpo', 'reward', 'kto', 'orpo', 'simpo')))
        s['autocast'] = pick((None, None, 'fp16' if s['dtype'] == 'fp16' else 'bf16'))
        s['length'] = pick(LENGTHS[:4] if s['attention'] == 'eager' else LENGTHS)
        s['batch'] = pick((1, 2, 4) if s['length'] < 4096 else (1,))
        if s['method'] == 'full': s['optim'] = pick(OPTIMS)
        else:
            small = dict(r=8) if MODELS[name][0] == 'phi3' else dict(r=8, target_modules=['q_proj', 'v_proj'])
            s['lora'] = pick((small,) if moe else (small, dict(r=16), dict(r=64)))
        if s['method'] == 'qlora': s |= dict(double_quant=pick((True, False)), upcast=pick((False, False, True)))
        if s['objective'] == 'sft': s['loss'] = pick(('ftkit', 'plain', 'kept'))
        if s['objective'] == 'reward' and MODELS[name][0] == 'granite': s['objective'] = 'dpo' # no class for rewards
        if s['objective'] in ('dpo', 'kto'): s['reference'] = pick((None, 'precomputed', 'copy'))
        if s['attention'] == 'flash' and (s['dtype'], s['autocast']) == ('fp32', None): s['attention'] = 'sdpa'
        yield name,s

def compared(row):
    "Both figures, and the seconds they took"
    from ftkit.memory import estimate
    from ftkit.simulate import simulate
    name,s = row
    config,found = model(name),{}
    for what,f in dict(simulate=simulate, estimate=estimate).items():
        start = time.perf_counter()
        found[what] = f(config, **s)
        found[f'{what}_s'] = round(time.perf_counter()-start, 4)
    sim,est = found['simulate'],found['estimate']
    return dict(model=name, **{k: s.get(k, '') for k in NAMES}, simulated=sim.allocated, reserved=sim.reserved,
                expandable=sim.expandable, estimated=est.allocated, peak=est.peak,
                simulate_s=found['simulate_s'], estimate_s=found['estimate_s'])

NAMES = ('method attention checkpointing dtype autocast objective length batch optim lora double_quant upcast loss '
         'reference').split()

def again():
    "The closed form once more, against what has been traced"
    from ftkit.memory import estimate
    with open(HERE/'estimate.csv') as f: done = [*csv.DictReader(f)]
    configs = {name: model(name) for name in MODELS}
    for (name,s),row in zip(drawn(len(done)), done):
        start = time.perf_counter()
        found = estimate(configs[name], **s)
        row |= dict(estimated=found.allocated, peak=found.peak, estimate_s=round(time.perf_counter()-start, 4))
    return done

def traced(n, processes):
    "Both, for n settings"
    done = []
    with ProcessPoolExecutor(processes) as pool:
        for row in pool.map(compared, drawn(n)):
            done.append(row)
            print(f'\r{len(done)} of {n}', end='', file=sys.stderr)
    return done

def main(n=550, processes=2):
    done = traced(n, processes) if n else again()
    with open(HERE/'estimate.csv', 'w', newline='') as f:
        out = csv.DictWriter(f, done[0], lineterminator='\n')
        out.writeheader()
        out.writerows(done)
    errors = [int(r['estimated'])/int(r['simulated'])-1 for r in done]
    size,half = sorted(map(abs, errors)),len(done)//2
    ms,s = sorted(float(r['estimate_s']) for r in done)[half]*1e3,sorted(float(r['simulate_s']) for r in done)[half]
    print(f'{len(done)} settings: median {size[half]:.2%}, 95th percentile {size[int(.95*len(size))]:.2%}, '
          f'worst {size[-1]:.2%}, bias {sum(errors)/len(errors):+.2%}; {ms:.1f} ms against {s:.1f} s')

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
