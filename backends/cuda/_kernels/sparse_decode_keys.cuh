// The fourth warpgroup of `sparse_decode.cu`: finds a row's records, decodes them, and stores them
// as keys.

#pragma once

#include "sparse_decode.cuh"

// The slot of a row's key; -1 for none.
__device__ __forceinline__ int key_slot(const Work& w, const Item& item, int block, int key) {
    const int at = (item.first + block) * KEYS + key;
    if (block >= item.count || at >= item.length) return -1;
    return __ldg(indices_of(w, item) + at * w.index_k);
}

// A thread's share of a record: 16 columns of each 64.
struct Raw {
    uint4 scale, latent[CHUNKS], rope[2];
};

__device__ __forceinline__ void load_key(const unsigned char* at, int quad, Raw& raw) {
    raw.scale = make_uint4(0, 0, 0, 0);
    if (at) raw.scale = load16(at + LATENT);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        raw.latent[c] = make_uint4(0, 0, 0, 0);
        if (at) raw.latent[c] = load16(at + c * 64 + quad * 16);
    }
#pragma unroll
    for (int c = 0; c < 2; c++) {
        raw.rope[c] = make_uint4(0, 0, 0, 0);
        if (at) raw.rope[c] = load16(at + ROPE_AT + quad * 32 + c * 16);
    }
}

__device__ __forceinline__ void store_key(const Raw& raw, unsigned to, int quad, int swap) {
    const unsigned low = ((quad * 2) ^ swap) << 4, high = ((quad * 2 + 1) ^ swap) << 4;
    const unsigned scales[4] = {raw.scale.x, raw.scale.y, raw.scale.z, raw.scale.w};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const float one = __uint_as_float(scales[c / 2]) * 0x1p120f;
        const unsigned f = pack(one, one);
        unsigned e[4], o[4];
        decode(raw.latent[c].x, f, e[0], o[0]);
        decode(raw.latent[c].y, f, e[1], o[1]);
        decode(raw.latent[c].z, f, e[2], o[2]);
        decode(raw.latent[c].w, f, e[3], o[3]);
        store16(to + c * KEYS * 128 + low, e[0], o[0], e[1], o[1]);
        store16(to + c * KEYS * 128 + high, e[2], o[2], e[3], o[3]);
    }
    to += CHUNKS * KEYS * 128;
    store16(to + low, raw.rope[0].x, raw.rope[0].y, raw.rope[0].z, raw.rope[0].w);
    store16(to + high, raw.rope[1].x, raw.rope[1].y, raw.rope[1].z, raw.rope[1].w);
}

// A key's slot is asked for two blocks, and its record brought to L2 one block, before it is used.
// A slot becomes an address only a block after it was asked for: until then nobody waits for it.
__device__ __forceinline__ void bring_keys(const Work& w, const Item& item, Shared& s, int& stage,
                                           unsigned& phase) {
    const int tid = threadIdx.x % 128, lane = tid % 32, group = lane / 4, quad = lane % 4;
    const int row0 = tid / 32 * 16 + group;  // this thread's keys are row0 and row0 + 8
    const unsigned char *now[2], *next[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        now[r] = record_at(w, key_slot(w, item, 0, row0 + 8 * r));
        next[r] = record_at(w, key_slot(w, item, 1, row0 + 8 * r));
    }
    for (int block = 0; block < item.count; block++) {
        int slot[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (next[r])
                for (int i = quad; i < 6; i += 4) prefetch(next[r] + min(i * 128, RECORD - 1));
            slot[r] = key_slot(w, item, block + 2, row0 + 8 * r);
        }
        Raw raw;
        load_key(now[0], quad, raw);
        barrier_wait(address(&s.spent[stage]), phase ^ 1);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (r) load_key(now[r], quad, raw);
            store_key(raw, address(s.keys[stage]) + (row0 + 8 * r) * 128, quad, group);
            if (quad == 0) s.valid[stage][row0 + 8 * r] = now[r] != nullptr;
            now[r] = next[r];
            next[r] = record_at(w, slot[r]);
        }
        fence_async();
        barrier_arrive(address(&s.ready[stage]));
        stage ^= 1;
        phase ^= stage == 0;
    }
}
