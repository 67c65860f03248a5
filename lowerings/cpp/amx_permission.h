#ifndef QFUSE_AMX_PERMISSION
#define QFUSE_AMX_PERMISSION
namespace qfuse {
#if !QFUSE_COMPILER_IS_OLD

// Ask Linux for the tile registers, once a process; false where it does not grant them.
static inline bool may_use_amx() {
    static const bool granted = [] {
        constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
        return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    }();
    return granted;
}

#endif
} // namespace qfuse
#endif
