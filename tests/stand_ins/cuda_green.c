/* A stand-in for libcuda's green contexts on a GPU of 132 SMs, for tests/test_green.py. Like the driver it gives whole
   steps of 8 SMs and refuses to split what no context holds. FAKE_GREEN names the fault: split, create, stream. */
#include <stdlib.h>
#include <string.h>

typedef int R;
typedef struct { int type; unsigned char padding[92]; unsigned sms; unsigned char rest[48]; } Resource;
typedef struct { unsigned sms; int alive; } Context;

static Context contexts[64];
static int made = 0, streams = 0, waited = 0;
static unsigned held = 0; /* SMs of the last resource that a context or the device holds: what may be split */

static int fault(const char *name) { const char *f = getenv("FAKE_GREEN"); return f && !strcmp(f, name); }

void fake_reset(void) { memset(contexts, 0, sizeof contexts); made = streams = waited = 0; }
int fake_contexts(void) { int n = 0; for (int i = 0; i < made; i++) n += contexts[i].alive; return n; }
int fake_streams(void) { return streams; }
int fake_waits(void) { return waited; }

R cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
R cuDeviceGetDevResource(int device, Resource *r, int type) { r->type = type; r->sms = held = 132; return 0; }
R cuDevSmResourceSplitByCount(Resource *out, unsigned *groups, const Resource *in, Resource *rest, unsigned flags, unsigned least) {
    unsigned size = (least + 7) / 8 * 8;
    if (fault("split") || in->sms != held) return 801;
    if (size > in->sms) { *groups = 0; return 0; }
    out->type = rest->type = in->type; out->sms = size; rest->sms = in->sms - size;
    return 0;
}
R cuDevResourceGenerateDesc(void **description, const Resource *r, unsigned count) { *description = (void *)(size_t)r->sms; return count != 1; }
R cuGreenCtxCreate(void **context, void *description, int device, unsigned flags) {
    if (fault("create") && made) return 2;
    contexts[made].sms = (unsigned)(size_t)description; contexts[made].alive = 1;
    *context = &contexts[made++]; return flags != 1;
}
R cuGreenCtxStreamCreate(void **stream, Context *context, unsigned flags, int priority) {
    if (fault("stream")) return 1;
    *stream = (void *)(size_t)(1000 + ++streams); return flags != 1;
}
R cuGreenCtxGetDevResource(Context *context, Resource *r, int type) { r->type = type; r->sms = held = context->sms; return 0; }
R cuGreenCtxDestroy(Context *context) { context->alive = 0; return 0; }
R cuStreamSynchronize(void *stream) { waited++; return 0; }
R cuStreamDestroy_v2(void *stream) { streams--; return 0; }
