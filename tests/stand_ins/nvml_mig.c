/* A stand-in for libnvidia-ml.so with one GPU's MIG, for tests/test_mig.py. FAKE_MIG names the fault:
   noperm (may look, may not change), noperm_look, busy, nosup, pending (MIG waits for a reset), second (the second
   instance is refused). Struct layouts are those of the Python package nvidia-ml-py. */
#include <stdlib.h>
#include <string.h>
#include <stdio.h>

typedef int R;
typedef void *H;
typedef struct { unsigned start, size; } Place;
typedef struct { unsigned version, id, p2p, slices, count, sms, copy, dec, enc, jpeg, ofa; unsigned long long mb; char name[96]; } Profile;
typedef struct { unsigned version, id, slices, count, sms, copy, dec, enc, jpeg, ofa; char name[96]; } Compute;
typedef struct { unsigned sms, copy, dec, enc, jpeg, ofa, gslices, cslices; unsigned long long mb; } Attributes;

static const struct { unsigned number, id, slices, size, sms, mb, nstarts, starts[7]; const char *name; } P[] = {
    {0, 19, 1, 1, 16, 16384, 7, {0, 1, 2, 3, 4, 5, 6}, "MIG 1g.18gb"},
    {9, 15, 1, 2, 26, 33280, 4, {0, 2, 4, 6}, "MIG 1g.35gb"},
    {7, 20, 1, 1, 16, 16384, 7, {0, 1, 2, 3, 4, 5, 6}, "MIG 1g.18gb+me"},
    {1, 14, 2, 2, 32, 33280, 3, {0, 2, 4}, "MIG 2g.35gb"},
    {2, 9, 3, 4, 60, 71424, 2, {0, 4}, "MIG 3g.71gb"},
    {3, 5, 4, 4, 64, 71424, 1, {0}, "MIG 4g.71gb"},
    {4, 0, 7, 8, 132, 143360, 1, {0}, "MIG 7g.141gb"},
};
enum { NP = sizeof P / sizeof *P };
static struct { int used, computing; unsigned profile, start; } I[7];
static unsigned mode = 0, pending = 0;

static int fault(const char *name) { const char *f = getenv("FAKE_MIG"); return f && !strcmp(f, name); }
static R look(void) { return fault("nosup") ? 3 : fault("noperm_look") ? 4 : 0; }
static int profile_of(unsigned id) { for (int i = 0; i < NP; i++) if (P[i].id == id) return i; return -1; }

void fake_reset(void) { memset(I, 0, sizeof I); mode = pending = 0; }
unsigned fake_mode(void) { return mode | pending; }
int fake_instances(void) { int n = 0; for (int i = 0; i < 7; i++) n += I[i].used; return n; }

R nvmlInitWithFlags(unsigned f) { return 0; }
R nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(R r) { return r == 4 ? "Insufficient Permissions" : r == 3 ? "Not Supported" : r == 19 ? "In use" : "fake error"; }
R nvmlDeviceGetHandleByIndex_v2(unsigned i, H *h) { if (i) return 2; *h = (H)16; return 0; }
R nvmlDeviceGetName(H h, char *b, unsigned n) { strncpy(b, "NVIDIA H200", n); return 0; }
R nvmlDeviceGetUUID(H h, char *b, unsigned n) { snprintf(b, n, "MIG-fake-%d", (int)((size_t)h - 100)); return 0; }
R nvmlDeviceGetMigMode(H h, unsigned *c, unsigned *p) { if (look()) return look(); *c = mode; *p = pending; return 0; }
R nvmlDeviceSetMigMode(H h, unsigned m, unsigned *s) {
    if (fault("noperm")) return 4;
    *s = 0; pending = m;
    if (!fault("pending") || !m) mode = m;
    return 0;
}
R nvmlDeviceGetComputeRunningProcesses_v3(H h, unsigned *n, void *out) {
    if (!fault("busy")) { *n = 0; return 0; }
    if (!out) { *n = 1; return 7; }
    *n = 1; memset(out, 0, 24); return 0;
}
R nvmlDeviceGetGpuInstanceProfileInfoV(H h, unsigned number, Profile *p) {
    for (int i = 0; i < NP; i++) if (P[i].number == number) {
        p->id = P[i].id; p->slices = P[i].slices; p->sms = P[i].sms; p->mb = P[i].mb; p->count = P[i].nstarts;
        strcpy(p->name, P[i].name); return 0;
    }
    return 3;
}
R nvmlDeviceGetGpuInstancePossiblePlacements_v2(H h, unsigned id, Place *out, unsigned *n) {
    int p = profile_of(id); if (p < 0) return 2;
    for (unsigned i = 0; i < P[p].nstarts; i++) { out[i].start = P[p].starts[i]; out[i].size = P[p].size; }
    *n = P[p].nstarts; return 0;
}
R nvmlDeviceCreateGpuInstanceWithPlacement(H h, unsigned id, const Place *at, H *out) {
    int p = profile_of(id);
    if (fault("noperm")) return 4;
    if (!mode) return 3;
    if (p < 0 || (fault("second") && fake_instances())) return 23;
    for (int i = 0; i < 7; i++) if (I[i].used) {
        int q = profile_of(I[i].profile);
        if (at->start < I[i].start + P[q].size && I[i].start < at->start + at->size) return 23;
    }
    for (int i = 0; i < 7; i++) if (!I[i].used) {
        I[i].used = 1; I[i].computing = 0; I[i].profile = id; I[i].start = at->start;
        *out = (H)(size_t)(100 + i); return 0;
    }
    return 23;
}
R nvmlGpuInstanceDestroy(H g) { int i = (int)((size_t)g - 100); if (I[i].computing) return 19; I[i].used = 0; return 0; }
R nvmlGpuInstanceGetComputeInstanceProfileInfoV(H g, unsigned number, unsigned engine, Compute *c) {
    static const unsigned slices[] = {1, 2, 3, 4, 7};
    int p = profile_of(I[(size_t)g - 100].profile);
    if (number > 4 || slices[number] > P[p].slices) return 3;
    c->id = number; c->slices = slices[number]; return 0;
}
R nvmlGpuInstanceCreateComputeInstance(H g, unsigned id, H *out) {
    static const unsigned slices[] = {1, 2, 3, 4, 7};
    int i = (int)((size_t)g - 100);
    if (slices[id] != P[profile_of(I[i].profile)].slices) return 2;
    I[i].computing = 1; *out = (H)(size_t)(200 + i); return 0;
}
R nvmlComputeInstanceDestroy(H c) { I[(size_t)c - 200].computing = 0; return 0; }
R nvmlDeviceGetMaxMigDeviceCount(H h, unsigned *n) { *n = 7; return 0; }
R nvmlDeviceGetMigDeviceHandleByIndex(H h, unsigned i, H *out) {
    if (i > 6 || !I[i].used || !I[i].computing) return 6;
    *out = (H)(size_t)(100 + i); return 0;
}
R nvmlDeviceGetAttributes_v2(H g, Attributes *a) {
    int p = profile_of(I[(size_t)g - 100].profile);
    memset(a, 0, sizeof *a); a->sms = P[p].sms; a->mb = P[p].mb; return 0;
}
