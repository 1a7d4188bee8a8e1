# Makes a guest's kernel another's than the machine's it was saved from: reseeds its random numbers
# from standard input, and sets its clock and shows a boot id of its own where it is told to.
#
# usage: renew [SECONDS FILE PLACE]
#
# Adds what it reads (at most 512 bytes, 4 bits of entropy for each, since it is hexadecimal digits),
# then has the generators of all processors take it in at once, which writing to /dev/urandom does
# not. Then the clock says SECONDS since 1970, and FILE is mounted over PLACE. Exit status 0 only if
# all of it was done.
#
# A program of its own, since no shell can make all these calls, one instead of three, since each
# takes an emulated guest 15 ms to start, and whole with its ELF header, since a dynamically linked
# interpreter would take it 50 ms.
#
#   as --64 -o renew.o renew.S
#   objcopy -O binary -j .text renew.o renew.bin

        .set    BASE, 0x400000
        .set    MOST, 512
        .set    RNDADDENTROPY, 0x40085203
        .set    RNDRESEEDCRNG, 0x5207
        .set    O_WRONLY, 1
        .set    MS_BIND, 4096
        .set    CLOCK_REALTIME, 0
        .set    SYS_READ, 0
        .set    SYS_OPEN, 2
        .set    SYS_IOCTL, 16
        .set    SYS_EXIT, 60
        .set    SYS_MOUNT, 165
        .set    SYS_CLOCK_SETTIME, 227

        .text
header:
        .byte   0x7F, 'E', 'L', 'F', 2, 1, 1, 0
        .quad   0
        .word   2, 62                           # an executable for x86-64
        .long   1
        .quad   BASE + start - header
        .quad   program_header - header
        .quad   0
        .long   0
        .word   64, 56, 1, 0, 0, 0
program_header:
        .long   1, 7                            # to be loaded; read, write, execute
        .quad   0, BASE, BASE
        .quad   end - header
        .quad   end - header + 8 + MOST
        .quad   0x1000

start:
        # The buffer follows the code: struct rand_pool_info of <linux/random.h>.
        leaq    end(%rip), %r12
        xorl    %ebx, %ebx
fill:
        movl    $SYS_READ, %eax
        xorl    %edi, %edi
        leaq    8(%r12, %rbx), %rsi
        movl    $MOST, %edx
        subl    %ebx, %edx
        jz      filled
        syscall
        testq   %rax, %rax
        js      failed
        jz      filled
        addl    %eax, %ebx
        jmp     fill
filled:
        testl   %ebx, %ebx
        jz      failed
        movl    %ebx, 4(%r12)
        shll    $2, %ebx
        movl    %ebx, (%r12)

        movl    $SYS_OPEN, %eax
        leaq    path(%rip), %rdi
        movl    $O_WRONLY, %esi
        syscall
        testq   %rax, %rax
        js      failed
        movq    %rax, %r13

        movl    $SYS_IOCTL, %eax
        movq    %r13, %rdi
        movl    $RNDADDENTROPY, %esi
        movq    %r12, %rdx
        syscall
        testq   %rax, %rax
        jnz     failed

        movl    $SYS_IOCTL, %eax
        movq    %r13, %rdi
        movl    $RNDRESEEDCRNG, %esi
        xorl    %edx, %edx
        syscall
        testq   %rax, %rax
        jnz     failed

        # On the stack: how many words there are, then these, the program's name first.
        cmpq    $1, (%rsp)
        je      done
        cmpq    $4, (%rsp)
        jne     failed
        movq    16(%rsp), %rsi
        xorl    %eax, %eax
digit:
        movzbl  (%rsi), %ecx
        testl   %ecx, %ecx
        jz      counted
        subl    $'0', %ecx
        cmpl    $9, %ecx
        ja      failed
        imulq   $10, %rax
        addq    %rcx, %rax
        incq    %rsi
        jmp     digit
counted:
        # struct timespec
        pushq   $0
        pushq   %rax
        movl    $SYS_CLOCK_SETTIME, %eax
        movl    $CLOCK_REALTIME, %edi
        movq    %rsp, %rsi
        syscall
        addq    $16, %rsp
        testq   %rax, %rax
        jnz     failed

        movl    $SYS_MOUNT, %eax
        movq    24(%rsp), %rdi
        movq    32(%rsp), %rsi
        xorl    %edx, %edx
        movl    $MS_BIND, %r10d
        xorl    %r8d, %r8d
        syscall
        testq   %rax, %rax
        jnz     failed
done:
        xorl    %edi, %edi
leave:
        movl    $SYS_EXIT, %eax
        syscall
failed:
        movl    $1, %edi
        jmp     leave

path:
        .asciz  "/dev/urandom"
        .balign 8
end:
