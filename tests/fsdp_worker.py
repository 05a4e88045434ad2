"One of two real processes that share a model by FSDP: what rank 0 finds is on standard output"
import json, os, sys, warnings

def made(method):
    "A small model, the same in both processes"
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(LlamaConfig(**json.loads(os.environ['SHAPE'])), dtype=torch.float32,
                                           attn_implementation='sdpa').train()
    if method == 'full': return net
    from peft import LoraConfig, get_peft_model
    return get_peft_model(net, LoraConfig(r=16, lora_alpha=32, target_modules='all-linear', init_lora_weights=False))

def flat(net, mesh):
    "The same with FSDP1"
    from ftkit import simulate as S
    return allocations(S._flat(net, None), None)

def allocations(net, mesh):
    "Of two steps, one after the other, and of a save as accelerate has it"
    import torch
    from ftkit import simulate as S
    if mesh: S._shard(net, mesh, None)
    trained,ids,m = [p for p in net.parameters() if p.requires_grad],torch.zeros(2, 64).long(),S.meter(S._scratch())
    for p in net.parameters(): m.add(S._mine(p)) # are there already
    optimizer = torch.optim.AdamW(trained, foreach=True)
    with S._like_a_gpu(net, 'sdpa'), S._followed(m), m:
        for _ in range(2): S._step(m, net, optimizer, S._plain, dict(input_ids=ids), torch.enable_grad, True,
                                   passes=int(os.environ['PASSES']))
        if mesh: saved(m, net)
        else: S._saved(m, net) # FSDP1 moves nothing from a CPU to a CPU
    return [(e.phase, e.size) for e in m.events if e.n > 0 and e.phase != 'load']

def saved(m, net):
    "What accelerate's get_state_dict does under FSDP2"
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    m.phase = 'saving'
    get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True,
                                                       cpu_offload=True))

def gradients(net, mesh):
    "How far those of our loss are from those of one process, by the name of a weight, beside their own size"
    import torch
    from ftkit import simulate as S
    ids = [torch.randint(0, 1000, (2, 40), generator=torch.Generator().manual_seed(k)) for k in range(2)]
    sum(S._plain(net, dict(input_ids=i)) for i in ids).div(2).backward()
    alone = {n: p.grad.clone() for n,p in net.named_parameters() if p.requires_grad}
    net.zero_grad()
    S._shard(net, mesh, None)
    S._own(net, dict(input_ids=ids[mesh.get_local_rank()])).backward()
    shared = {n: p.grad.full_tensor() for n,p in net.named_parameters() if p.requires_grad}
    return {n: float((shared[n] - g).norm()/g.norm()) for n,g in alone.items()}

def main(rank, meeting, what, method):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    dist.init_process_group('gloo', init_method=f'file://{meeting}', rank=int(rank), world_size=2)
    do = dict(allocations=allocations, flat=flat, gradients=gradients)[what]
    found = do(made(method), init_device_mesh('cpu', (2,)))
    if rank == '0': print(json.dumps(found))
    dist.destroy_process_group()

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    main(*sys.argv[1:])
