/* A stand-in for the driver's NVML, for tests on machines without a GPU: nvidia-ml-py loads it as libnvidia-ml.so.1.
 *
 * One GPU draws `power_mw`; its energy counter ticks every `tick_ms`. Time is the machine's monotonic clock, or what
 * `time_ns` was last set to. A test steers it through fake_nvml_set(name, value), by ctypes, or by an environment
 * variable FAKE_NVML_NAME read at nvmlInit. Faults: from the `fault_first`th reading of the energy counter on, for
 * `fault_calls` readings, the call named by `fault_where` answers `fault_code`.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int Return;
typedef void *Handle;
typedef struct { unsigned gpu, memory; } Rates;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; } Process;
typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    int type, result;
    union { double d; unsigned u; unsigned long long ull; } value;
} Field;

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { WHERE_ENERGY = 1, WHERE_POWER = 2, WHERE_REST = 4, WHERE_INIT = 8 };

static const char *const NAMES[] = {
    "power_mw", "tick_ms", "time_ns", "fault_code", "fault_first", "fault_calls", "fault_where",
    "mig", "processes", "reasons", "counter_offset_mj", "instant", "reads", "temperature",
};
enum {
    POWER_MW, TICK_MS, TIME_NS, FAULT_CODE, FAULT_FIRST, FAULT_CALLS, FAULT_WHERE,
    MIG, PROCESSES, REASONS, OFFSET_MJ, INSTANT, READS, TEMPERATURE, COUNT,
};
static long long values[COUNT] = {
    [POWER_MW] = 300000, [TICK_MS] = 100, [FAULT_CALLS] = 1LL << 60, [FAULT_WHERE] = WHERE_ENERGY,
    [OFFSET_MJ] = 5000000, [INSTANT] = 1, [PROCESSES] = 1, [TEMPERATURE] = 40,
};
static char GPU[] = "GPU-00000000-0000-0000-0000-00000000fa4e", MIG_DEVICE[] = "MIG-00000000-0000-0000-0000-00000000fa4e";

int fake_nvml_set(const char *name, long long value) {
    for (int i = 0; i < COUNT; i++)
        if (!strcmp(name, NAMES[i])) { values[i] = value; return 0; }
    return -1;
}

long long fake_nvml_get(const char *name) {
    for (int i = 0; i < COUNT; i++)
        if (!strcmp(name, NAMES[i])) return values[i];
    return -1;
}

static long long now_ns(void) {
    struct timespec t;
    if (values[TIME_NS]) return values[TIME_NS];
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static Return fault(int where) {
    long long since = values[READS] - values[FAULT_FIRST];
    if (!values[FAULT_CODE] || !(values[FAULT_WHERE] & where)) return SUCCESS;
    return since >= 0 && since < values[FAULT_CALLS] ? (Return)values[FAULT_CODE] : SUCCESS;
}

static Return init(void) {
    char variable[64];
    for (int i = 0; i < COUNT; i++) {
        snprintf(variable, sizeof variable, "FAKE_NVML_%s", NAMES[i]);
        for (char *c = variable; *c; c++) if (*c >= 'a' && *c <= 'z') *c -= 32;
        if (getenv(variable)) values[i] = atoll(getenv(variable));
    }
    return fault(WHERE_INIT);
}

Return nvmlInitWithFlags(unsigned flags) { (void)flags; return init(); }
Return nvmlInit_v2(void) { return init(); }
Return nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(Return r) { static char text[32]; snprintf(text, sizeof text, "fake error %d", r); return text; }
Return nvmlSystemGetDriverVersion(char *text, unsigned n) { snprintf(text, n, "999.99"); return SUCCESS; }
Return nvmlDeviceGetCount_v2(unsigned *n) { *n = 1; return SUCCESS; }

Return nvmlDeviceGetHandleByIndex_v2(unsigned index, Handle *d) {
    *d = GPU;
    return index == 0 ? SUCCESS : NOT_FOUND;
}

Return nvmlDeviceGetHandleByUUID(const char *uuid, Handle *d) {
    *d = !strcmp(uuid, MIG_DEVICE) ? MIG_DEVICE : GPU;
    return !strcmp(uuid, GPU) || !strcmp(uuid, MIG_DEVICE) ? SUCCESS : NOT_FOUND;
}

Return nvmlDeviceIsMigDeviceHandle(Handle d, unsigned *is) { *is = d == MIG_DEVICE; return SUCCESS; }
Return nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Handle d, Handle *gpu) { (void)d; *gpu = GPU; return SUCCESS; }
Return nvmlDeviceGetUUID(Handle d, char *text, unsigned n) { snprintf(text, n, "%s", (char *)d); return SUCCESS; }
Return nvmlDeviceGetName(Handle d, char *text, unsigned n) { (void)d; snprintf(text, n, "Fake GPU, no real one"); return SUCCESS; }
Return nvmlDeviceGetMigMode(Handle d, unsigned *now, unsigned *next) { (void)d; *now = *next = !!values[MIG]; return SUCCESS; }

Return nvmlDeviceGetTotalEnergyConsumption(Handle d, unsigned long long *mj) {
    (void)d;
    values[READS]++;
    Return r = fault(WHERE_ENERGY);
    if (r) return r;
    long long ticks = now_ns() / (values[TICK_MS] * 1000000);
    *mj = values[OFFSET_MJ] + ticks * values[TICK_MS] * values[POWER_MW] / 1000;
    return SUCCESS;
}

Return nvmlDeviceGetFieldValues(Handle d, int n, Field *fields) {
    (void)d;
    for (int i = 0; i < n; i++) {
        int known = fields[i].field == 186 ? values[INSTANT] : fields[i].field == 185;
        fields[i].type = 1;
        fields[i].result = known ? fault(WHERE_POWER) : NOT_SUPPORTED;
        fields[i].value.u = (unsigned)(fields[i].scope == 2 ? values[POWER_MW] / 5 : values[POWER_MW]);
    }
    return SUCCESS;
}

Return nvmlDeviceGetPowerUsage(Handle d, unsigned *mw) { (void)d; *mw = (unsigned)values[POWER_MW]; return fault(WHERE_POWER); }
Return nvmlDeviceGetEnforcedPowerLimit(Handle d, unsigned *mw) { (void)d; *mw = 700000; return fault(WHERE_POWER); }
Return nvmlDeviceGetTemperature(Handle d, int sensor, unsigned *c) { (void)d, (void)sensor; *c = (unsigned)values[TEMPERATURE]; return fault(WHERE_REST); }
Return nvmlDeviceGetClockInfo(Handle d, int which, unsigned *mhz) { (void)d; *mhz = which == 2 ? 3201 : 1980; return fault(WHERE_REST); }
Return nvmlDeviceGetUtilizationRates(Handle d, Rates *r) {
    (void)d;
    r->gpu = 97, r->memory = 41;
    return values[MIG] ? NOT_SUPPORTED : fault(WHERE_REST);
}
Return nvmlDeviceGetMemoryInfo(Handle d, Memory *m) { (void)d; *m = (Memory){80ULL << 30, 60ULL << 30, 20ULL << 30}; return fault(WHERE_REST); }
Return nvmlDeviceGetCurrentClocksEventReasons(Handle d, unsigned long long *bits) { (void)d; *bits = (unsigned long long)values[REASONS]; return fault(WHERE_REST); }

Return nvmlDeviceGetComputeRunningProcesses_v3(Handle d, unsigned *n, Process *found) {
    (void)d;
    unsigned have = (unsigned)values[PROCESSES], room = found ? *n : 0;
    Return r = fault(WHERE_REST);
    if (r) return r;
    *n = have;
    if (room < have) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < have; i++) found[i] = (Process){4000000 + i, 1 << 20, 0, 0};
    return SUCCESS;
}
