"""LoRA on packed chat data, a large vocabulary: tokens per second and peak memory, beside TRL's SFTTrainer

    python bench/sft.py [STEPS] [ROUNDS]

The model has the shape of Qwen2.5-0.5B, random weights; prompts are masked. A CPU takes four of its layers in fp32 and
two rows of 1,024 tokens a step, a GPU all 24 in bf16 and eight rows of 2,048. TRL runs with its chunked loss and
packing 'bfd'. Each side runs in a process of its own, in turns; the better of two runs counts. Torch counts the work of
a step on our side; its share of the rate at which the machine multiplies matrices says how far there is to go. Seven
minutes on a CPU. Prints one line per side, kept in bench/results/sft.json.
"""
import os
os.environ |= dict(TOKENIZERS_PARALLELISM='false', HF_DATASETS_DISABLE_PROGRESS_BARS='1', IN_TEST='1')
import json, resource, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from machine import DATA, keep

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1]/'shared'/'data'
GPU = torch.cuda.is_available()
DEVICE,PRECISION,DTYPE = ('cuda', 'bf16', torch.bfloat16) if GPU else ('cpu', 'fp32', torch.float32)
LAYERS,LENGTH,BATCH,STEPS = (24, 2048, 8, '20') if GPU else (4, 1024, 2, '3')

def model():
    "A random Qwen2.5-0.5B"
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864,
        num_hidden_layers=LAYERS, num_attention_heads=14, num_key_value_heads=2,
        tie_word_embeddings=True)).to(DEVICE, DTYPE)

def adapted():
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model(), LoraConfig(r=16, lora_alpha=32, target_modules='all-linear', task_type='CAUSAL_LM'))

def tokenizer():
    "Qwen's where the shared data are, ftkit's own where not"
    from transformers import AutoTokenizer
    from ftkit.chat import set_template
    from ftkit.models import load_tokenizer
    tok = AutoTokenizer.from_pretrained(SHARED/'tokenizers'/'qwen3') if SHARED.is_dir() else load_tokenizer('embedded')
    set_template(tok, 'chatml')
    return tok

def encoded(tok):
    from ftkit.formats import load
    from ftkit.lengths import cut_dataset
    from ftkit.mask import encode_dataset
    path = SHARED/'datasets'/'alpaca_gpt4_en_demo.jsonl'
    return cut_dataset(encode_dataset(tok, load(path) if path.exists() else load('tasks')), LENGTH, 'right')[0]

def rate():
    "Multiplications and additions per second of a product as in a layer"
    kind = dict(device=DEVICE, dtype=DTYPE)
    a,b,times = torch.randn(BATCH*LENGTH, 896, **kind),torch.randn(896, 4864, **kind),[]
    for _ in range(12):
        start = time.perf_counter()
        for _ in range(20 if GPU else 1): a@b
        if GPU: torch.cuda.synchronize()
        times.append((time.perf_counter()-start)/(20 if GPU else 1))
    return 2*a.numel()*b.shape[1]/min(times)

def peak():
    "The most bytes that were in use: of the GPU, or of the process"
    return torch.cuda.max_memory_allocated() if GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024

def work(tok, packed):
    "Multiplications and additions of a step"
    from torch.utils.flop_counter import FlopCounterMode
    from ftkit.answers import on_device
    from ftkit.logps import head
    from ftkit.pack import Collator
    from ftkit.train import OBJECTIVES
    net = adapted()
    top,batch = head(net),on_device(Collator(tok)([packed[i] for i in range(BATCH)]), DEVICE)
    with FlopCounterMode(display=False) as counter: OBJECTIVES['sft'].loss(net, top, batch).losses.sum().backward()
    return counter.get_total_flops()

def one(which, steps, folder):
    "Print a run's figures as JSON"
    tok = tokenizer()
    data = encoded(tok)
    options = dict(per_device_train_batch_size=BATCH, learning_rate=2e-4, logging_steps=1, save_strategy='no', seed=0)
    if which == 'ftkit':
        from ftkit.pack import pack_dataset
        from ftkit.train import train
        packed,net = pack_dataset(data, LENGTH),adapted()
        def run(n): return train(net, tok, packed, out=f'{folder}/ftkit', overwrite=True, max_steps=n,
                                 precision=PRECISION, **options).log
    else:
        from trl import SFTConfig, SFTTrainer
        net = adapted()
        def run(n):
            args = SFTConfig(f'{folder}/trl', max_steps=n, **options, max_length=LENGTH, packing=True, use_cpu=not GPU,
                             bf16=GPU, gradient_checkpointing=False, report_to='none', disable_tqdm=True)
            trainer = SFTTrainer(net, args, train_dataset=data.select_columns(['input_ids', 'labels']),
                                 processing_class=tok)
            trainer.train()
            return trainer.state.log_history
    def timed(n):
        start = time.perf_counter()
        return run(n), time.perf_counter()-start
    run(1)
    one_step,(log,all_steps) = timed(1)[1],timed(steps+1)
    seconds = (all_steps-one_step)/steps # without what is done once
    losses = [e['loss'] for e in log if 'loss' in e]
    print(json.dumps(dict(seconds=seconds, first=losses[0], last=losses[-1], peak=peak())))

def main(steps=STEPS, rounds='2'):
    sides = dict(ftkit=[], trl=[])
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(int(rounds)):
            for which,runs in sides.items():
                out = subprocess.check_output([sys.executable, __file__, which, steps, folder], text=True)
                runs.append(json.loads(out.splitlines()[-1]))
    from ftkit.pack import pack_dataset
    tok = tokenizer()
    packed = pack_dataset(encoded(tok), LENGTH)
    flops,limit = work(tok, packed),rate()
    labels = sum(packed[:50]['labels'], [])
    trained = sum(l != -100 for l in labels)/len(labels)
    best = {which: min(runs, key=lambda r: r['seconds']) for which,runs in sides.items()}
    for which,r in best.items():
        print(f"{which}: {BATCH*LENGTH/r['seconds']:,.0f} tokens/s, peak {r['peak']/2**30:.2f} GiB, "
              f"{flops/r['seconds']/limit:.0%} of the matmul rate, loss {r['first']:.3f} to {r['last']:.3f}")
    ours,theirs = best['ftkit'],best['trl']
    faster,memory = theirs['seconds']/ours['seconds'],ours['peak']/theirs['peak']
    print(f"{faster:.2f} times TRL's tokens/s, {memory:.2f} of its memory; "
          f'{flops/1e12:.2f} TFLOP a step, {limit/1e9:.0f} GFLOP/s, {trained:.0%} of the tokens trained')
    keep('sft', sides=sides, flops=flops, rate=limit, trained=trained, tokens=BATCH*LENGTH, data=DATA)

if __name__ == '__main__':
    if sys.argv[1:2] in (['ftkit'], ['trl']): one(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else: main(*sys.argv[1:])
