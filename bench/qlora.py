"""QLoRA of a random Llama-3.1-8B: peak memory and tokens per second, beside PEFT and bitsandbytes as TRL sets them up

    python bench/qlora.py [8b|tiny] [STEPS]

Needs a GPU with 24 GB and 20 GB of disk for 8b; `tiny` shows on a CPU that the script runs. Each side runs in a process
of its own, on the same rows of 1,024 tokens (64 for tiny), one at a time, twice. Prints one line per side, kept in
bench/results/qlora.json.
"""
import json, os, subprocess, sys, tempfile, time
import torch
from machine import keep

SIZES = {'8b': dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                    num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
         'tiny': dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                      vocab_size=320)}
GPU = torch.cuda.is_available()

def make(size, folder):
    "A random model and a byte tokenizer with ChatML"
    from transformers import LlamaConfig, LlamaForCausalLM
    from ftkit.chat import set_template
    from ftkit.tiny import train_tokenizer
    torch.set_default_dtype(torch.bfloat16)
    with torch.device('cuda' if GPU else 'cpu'): model = LlamaForCausalLM(LlamaConfig(**SIZES[size]))
    model.save_pretrained(folder)
    tok = train_tokenizer([])
    set_template(tok, 'chatml')
    tok.save_pretrained(folder)

def rows(size, steps):
    n,length = steps+1,1024 if size == '8b' else 64
    ids = torch.randint(256, (n, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [dict(input_ids=i, labels=i) for i in ids]

def one(which, size, steps, folder):
    "Print seconds a step and peak bytes"
    from datasets import Dataset
    data,precision = Dataset.from_list(rows(size, steps)),'bf16' if GPU else 'fp32'
    options = dict(max_steps=steps, per_device_train_batch_size=1, learning_rate=2e-4, gradient_checkpointing=True,
                   save_strategy='no', logging_steps=steps)
    if which == 'ftkit':
        from ftkit.models import load_model, load_tokenizer
        from ftkit.train import train
        tok = load_tokenizer(folder)
        model = load_model(folder, tok, 'qlora', precision, trainable_token_indices=None)
        run = lambda: train(model, tok, data, out=f'{folder}/run', overwrite=True, precision=precision, **options)
    else:
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
        from trl import SFTConfig, SFTTrainer
        dtype = torch.bfloat16 if GPU else torch.float32
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four, dtype=dtype)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules='all-linear', task_type='CAUSAL_LM')
        args = SFTConfig(f'{folder}/trl', **options, max_length=None, report_to='none', use_cpu=not GPU, bf16=GPU)
        trainer = SFTTrainer(model, args, train_dataset=data,
                             processing_class=AutoTokenizer.from_pretrained(folder), peft_config=lora)
        run = trainer.train
    start = time.perf_counter()
    run()
    if GPU: torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if GPU else 0
    seconds = (time.perf_counter()-start)/steps
    print(json.dumps(dict(side=which, seconds=seconds, peak=peak, tokens=len(data[0]['input_ids']))))

def main(size='8b', steps='20'):
    with tempfile.TemporaryDirectory() as folder:
        make(size, folder)
        figures = []
        for which in ('ftkit', 'trl')*2:
            command = [sys.executable, __file__, which, size, steps, folder]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(HF_HUB_OFFLINE='1'))
            if done.returncode: sys.exit(done.stderr[-3000:])
            f = json.loads(done.stdout.strip().split('\n')[-1])
            figures.append(f)
            print(f"{which}: {f['tokens']/f['seconds']:,.0f} tokens/s, peak {f['peak']/2**30:.2f} GB")
    keep('qlora', runs=figures)

if __name__ == '__main__':
    if sys.argv[1:2] in (['ftkit'], ['trl']): one(*sys.argv[1:3], int(sys.argv[3]), sys.argv[4])
    else: main(*sys.argv[1:])
