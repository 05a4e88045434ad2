"""Peak GPU memory of real training steps, random weights, each with the versions and settings it was measured with

    python bench/memory_gpu.py [SECONDS] [tiny]

Full, LoRA and QLoRA; SFT, reward, DPO, KTO, ORPO and GRPO; ours and TRL's trainers; attention of PyTorch and flash-attn
(a line with an error where it is not installed); optimizers; checkpointing; shapes of 0.5 to 8 billion weights. Every
row of a batch has the same length, so a figure belongs to one shape. Two steps each: the second has the optimizer's
states. What ours will take is said before each run. Stops starting new ones after SECONDS (560). `tiny` runs a small
shape, on a CPU too, where the figures are 0. Prints a line each and writes bench/memory_gpu.csv.
"""
import os
os.environ |= dict(TOKENIZERS_PARALLELISM='false', HF_DATASETS_DISABLE_PROGRESS_BARS='1', IN_TEST='1')
import csv, gc, importlib.metadata, sys, tempfile, time, traceback
from pathlib import Path
import torch

SHAPES = dict( # kind, layers, hidden, MLP, heads, KV heads, vocabulary, tied
    qwen05=('qwen2', 24, 896, 4864, 14, 2, 151936, True), llama1=('llama', 16, 2048, 8192, 32, 8, 128256, True),
    qwen3=('qwen3', 28, 2048, 6144, 16, 8, 151936, True), mistral7=('mistral', 32, 4096, 14336, 32, 8, 32768, False),
    llama8=('llama', 32, 4096, 14336, 32, 8, 128256, False), tiny=('llama', 2, 64, 128, 4, 2, 512, True))

def case(shape, method, objective='sft', length=2048, batch=1, checkpointing=False, optim='adamw_torch_fused',
         engine='ftkit', dtype='bf16', attention='sdpa', **options):
    return dict(shape=shape, method=method, objective=objective, length=length, batch=batch,
                checkpointing=checkpointing, optim=optim, engine=engine, dtype=dtype, attention=attention,
                options=options)

def several(text):
    "Cases from lines of `shape method objective length batch`, with flags and options behind"
    for line in text.strip().splitlines():
        shape,method,objective,length,batch,*more = line.split()
        flags = dict(m.split('=') for m in more if '=' in m)
        flags = {k: {'True': True, 'False': False}.get(v, v) for k,v in flags.items()}
        yield case(shape, method, objective, int(length), int(batch), checkpointing='gc' in more, **flags)

CASES = [*several('''
llama8 lora sft 2048 1
llama8 lora sft 2048 1 gc
llama8 qlora sft 2048 1 gc
llama8 lora dpo 512 2
llama8 full sft 2048 1 gc
llama8 lora sft 2048 1 gc engine=trl
llama1 full sft 2048 1
llama1 full sft 2048 1 optim=adamw_torch
llama1 full sft 2048 1 optim=adamw_8bit
llama1 full sft 2048 1 optim=paged_adamw_8bit
llama1 full sft 2048 1 optim=adafactor
llama1 full sft 2048 1 dtype=fp32
llama1 full sft 8192 1 gc
llama1 lora sft 2048 1
llama1 lora sft 2048 4
llama1 lora sft 16384 1 gc
llama1 lora sft 2048 1 engine=trl
llama1 full sft 2048 1 engine=trl
llama1 qlora sft 2048 1
llama1 qlora sft 2048 4 gc
llama1 qlora sft 2048 1 optim=paged_adamw_8bit
llama1 lora dpo 1024 4
llama1 lora dpo 1024 4 engine=trl
llama1 lora dpo 1024 4 gc
llama1 lora dpo 1024 4 packing=False
llama1 full dpo 1024 2 reference=copy
llama1 lora kto 1024 8
llama1 lora orpo 1024 4
llama1 lora reward 1024 4
llama1 full reward 1024 2
llama1 lora reward 1024 4 engine=trl
qwen05 full sft 2048 4
qwen05 lora sft 4096 2
qwen05 lora sft 2048 2 engine=trl
qwen05 lora dpo 512 8
qwen05 full orpo 512 8
qwen05 full sft 2048 2 dtype=fp32
qwen3 lora sft 4096 1
qwen3 full sft 2048 1 gc optim=adamw_8bit
qwen3 qlora dpo 1024 2
mistral7 lora sft 8192 1 gc
mistral7 qlora sft 4096 1 gc optim=paged_adamw_8bit
mistral7 lora reward 1024 2
llama1 lora grpo 1024 8
llama1 lora grpo 1024 8 gc
llama1 full grpo 512 8
qwen05 lora grpo 512 16
llama1 lora sft 2048 4 attention=flash
llama1 full sft 4096 1 gc attention=flash
qwen3 lora dpo 1024 2 attention=flash
llama8 qlora sft 4096 1 gc attention=flash
''')]
TINY = [case('tiny', method, 'grpo', 64, 4) for method in ('full', 'lora')]
TINY += [case('tiny', method, objective, 64, 2, engine=engine) for method in ('full', 'lora')
        for objective in ('sft', 'reward', 'dpo', 'kto', 'orpo') for engine in ('ftkit', 'trl')]
TINY += [case('tiny', 'qlora', length=64)]
GPU = torch.cuda.is_available()

def make(shape, objective, dtype, attention):
    "A random model of a shape, on the GPU"
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    kind,layers,hidden,mlp,heads,kv,vocab,tied = SHAPES[shape]
    config = AutoConfig.for_model(kind, num_hidden_layers=layers, hidden_size=hidden, intermediate_size=mlp,
        num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocab, tie_word_embeddings=tied,
        max_position_embeddings=32768, sliding_window=None, pad_token_id=0, **(
            dict(num_labels=1) if objective == 'reward' else {}))
    auto = AutoModelForSequenceClassification if objective == 'reward' else AutoModelForCausalLM
    kind = dict(flash='flash_attention_2').get(attention, attention)
    with torch.device('cuda' if GPU else 'cpu'): return auto.from_config(config, dtype=dtype, attn_implementation=kind)

def quantise(model):
    "NF4 with double quantisation in place of every linear layer but the head, as transformers does it"
    import bitsandbytes as bnb
    for name,layer in [*model.named_modules()]:
        if not isinstance(layer, torch.nn.Linear) or name in ('lm_head', 'score'): continue
        four = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, torch.bfloat16,
                                 compress_statistics=True, quant_type='nf4', device='meta')
        four.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type='nf4',
                                        compress_statistics=True, module=four).to(layer.weight.device)
        if layer.bias is not None: four.bias = layer.bias
        model.set_submodule(name, four)
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)

def adapted(model, objective):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules='all-linear',
                          task_type='SEQ_CLS' if objective == 'reward' else 'CAUSAL_LM'))

def rows(objective, length, n):
    "Rows of equal length; of answers the second half of each"
    g = torch.Generator().manual_seed(0)
    ids = lambda k: torch.randint(3, 256, (k,), generator=g).tolist()
    if objective == 'sft': return [dict(input_ids=x, labels=x) for x in (ids(length) for _ in range(n))]
    half = length//2
    if objective == 'kto': return [dict(prompt_ids=ids(half), completion_ids=ids(half), label=k%2 == 0,
                                        KL_completion_ids=ids(half)) for k in range(n)]
    return [dict(prompt_ids=ids(half), chosen_ids=ids(half), rejected_ids=ids(half)) for _ in range(n)]

def meter():
    "Bytes: allocated, most allocated, most reserved"
    if not GPU: return 0, 0, 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

def fresh():
    gc.collect()
    if not GPU: return
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()

class Meter:
    "A callback: memory after each step"
    def __new__(cls, found):
        from transformers import TrainerCallback
        class Each(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if GPU: torch.cuda.reset_peak_memory_stats()
            def on_step_end(self, args, state, control, **kwargs): found.append(meter())
        return Each()

def sampled(model, tok, folder, length, batch, checkpointing, optim, found):
    "Two steps of GRPO: a prompt, and as many tokens of each answer, which random weights do not end"
    from ftkit.rl import rl
    if checkpointing: model.gradient_checkpointing_enable(dict(use_reentrant=False))
    def each(*_):
        found.append(meter())
        if GPU: torch.cuda.reset_peak_memory_stats()
    def worth(completions, **_): return [*range(len(completions))]
    rl(model, tok, [dict(prompt=prompt_of(tok, length//2))], worth, 'grpo', folder, watch=each, steps=2,
       prompts_per_step=1, group=batch, max_new_tokens=length//2, micro_tokens=10**9, optim=optim,
       precision='bf16' if GPU else 'fp32')

def prompt_of(tok, tokens):
    "A question of so many tokens"
    from ftkit.mask import prompt_ids
    text,size = '',lambda text: len(prompt_ids(tok, [dict(role='user', content=text)]))
    while size(text) < tokens: text += '.' if size(text + 'x') > tokens else 'x'
    return text

def measure(shape, method, objective, length, batch, checkpointing, optim, engine, dtype, attention, options):
    "Bytes at the begin of a run and in its two steps"
    from datasets import Dataset
    from ftkit.train import train
    fresh()
    before = meter()[0]
    model = make(shape, objective, dict(bf16=torch.bfloat16, fp32=torch.float32)[dtype], attention)
    if method == 'qlora': model = quantise(model)
    if method != 'full': model = adapted(model, objective)
    fresh()
    ahead = predicted(model.config, method, objective, length, batch, checkpointing, optim, dtype, engine, attention,
                      options)
    if engine == 'trl' and objective == 'orpo': options = dict(sft_average='token') | options # as TRL has it
    loaded,steps,start = meter()[0],[],time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if objective == 'grpo': sampled(model, tokenizer(), f'{folder}/run', length, batch, checkpointing, optim, steps)
        else: train(
              model, tokenizer(), Dataset.from_list(rows(objective, length, 2*batch)), objective, out=f'{folder}/run',
              max_steps=2, per_device_train_batch_size=batch, gradient_checkpointing=checkpointing, optim=optim,
              engine=engine, precision='bf16', save_strategy='no', callbacks=[Meter(steps)], **options)
    return dict(predicted=ahead, before=before, loaded=loaded, seconds=round(time.perf_counter()-start, 1)) | {
        f'{name}_{k}': x for k,three in enumerate(steps, 1) for name,x in zip(('allocated', 'peak', 'reserved'), three)}

def predicted(config, method, objective, length, batch, checkpointing, optim, dtype, engine, attention, options):
    "Bytes that `ftkit.memory.estimate` says will be in use, said before the run; None for what it does not count"
    from ftkit.core import FtkitError
    from ftkit.memory import estimate
    if engine == 'trl' or options.keys() - {'reference'}: return None
    new = GPU and torch.cuda.get_device_capability()[0] > 8 # Hopper
    try: return estimate(config, method, length, batch, dtype, 'bf16' if GPU else None, attention, checkpointing, optim,
                         objective, **dict(workspace=2**25) if new else {}, **options).allocated
    except FtkitError: return None

def tokenizer():
    from ftkit.chat import set_template
    from ftkit.tiny import train_tokenizer
    tok = train_tokenizer([])
    set_template(tok, 'chatml')
    return tok

def setting():
    "Versions and GPU"
    names = 'torch', 'transformers', 'peft', 'trl', 'accelerate', 'bitsandbytes'
    free,total = torch.cuda.mem_get_info() if GPU else (0, 0)
    gpu = torch.cuda.get_device_name() if GPU else 'cpu'
    outside = total-free-torch.cuda.memory_reserved() if GPU else 0 # with a CUDA context
    return dict(gpu=gpu, total=total, outside=outside) | {n: importlib.metadata.version(n) for n in names}

def main(seconds='560', size=''):
    import ftkit.rl, ftkit.train
    for m in (ftkit.rl, ftkit.train): m.save = lambda *args, **kwargs: None # which would take longer than the steps
    if GPU: torch.ones(1).cuda()
    start,found,out = time.time(),[],Path(os.environ.get('OUT', Path(__file__).parent))/'memory_gpu.csv'
    for c in TINY if size == 'tiny' else CASES:
        if time.time()-start > float(seconds): break
        try: made = measure(**c)
        except Exception as e: # out of memory, above all: the others go on
            made = dict(error=f'{type(e).__name__}: {e}'.split('\n')[0])
            traceback.print_exc()
        found.append(c | dict(options=' '.join(f'{k}={v}' for k,v in c['options'].items())) | made)
        gib = f"{made.get('peak_2', 0)/2**30:.3f} GiB, reserved {made.get('reserved_2', 0)/2**30:.3f}"
        print(' '.join(str(v) for v in found[-1].values() if v is not None)[:90], made.get('error', gib), flush=True)
    columns = list(dict.fromkeys(k for row in found for k in row))
    with out.open('w') as f:
        w = csv.DictWriter(f, columns + list(setting()))
        w.writeheader()
        w.writerows(row | setting() for row in found)

if __name__ == '__main__': main(*sys.argv[1:])
